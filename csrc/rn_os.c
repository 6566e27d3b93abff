/* rn_os.c - see rn_os.h.
 *
 * Theory of operation: none of this runs while frames move. A guest's namespaces and tap are made by a
 * short-lived child before the session starts or by the guest's own first process; a stage calls the
 * prctl and capability functions once, between acquire() and run().
 */
#include "rn_os.h"
#include "rn_proto.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/nsfs.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

_Static_assert(RN_CLONE_NEWNS == CLONE_NEWNS && RN_CLONE_NEWUSER == CLONE_NEWUSER, "clone flags");
_Static_assert(RN_CLONE_NEWPID == CLONE_NEWPID && RN_CLONE_NEWNET == CLONE_NEWNET, "clone flags");
_Static_assert(RN_MS_BIND == MS_BIND && RN_MS_REC == MS_REC && RN_MS_SLAVE == MS_SLAVE, "mount flags");
_Static_assert(RN_MS_RDONLY == MS_RDONLY && RN_MS_NOSUID == MS_NOSUID && RN_MS_NODEV == MS_NODEV &&
	       RN_MS_NOEXEC == MS_NOEXEC, "mount flags");

static int ret(long r)
{
	return r < 0 ? -errno : (int)r;
}

int rn_os_unshare(int flags)
{
	return ret(unshare(flags));
}

int rn_os_setns(int fd, int nstype)
{
	return ret(setns(fd, nstype));
}

int rn_os_ns_type(int fd)
{
	return ret(ioctl(fd, NS_GET_NSTYPE));
}

int rn_os_ns_owner(int fd)
{
	return ret(ioctl(fd, NS_GET_USERNS));
}

int rn_os_pdeathsig(int sig)
{
	return ret(prctl(PR_SET_PDEATHSIG, (unsigned long)sig, 0, 0, 0));
}

int rn_os_no_new_privs(void)
{
	return ret(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

int rn_os_set_name(const char *name)
{
	return ret(prctl(PR_SET_NAME, name, 0, 0, 0));
}

int rn_os_subreaper(int on)
{
	int was = 0;

	if (prctl(PR_GET_CHILD_SUBREAPER, &was, 0, 0, 0) < 0 || prctl(PR_SET_CHILD_SUBREAPER, (unsigned long)!!on, 0, 0, 0) < 0)
		return -errno;
	return !!was;
}

int rn_os_drop_caps(void)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3];
	unsigned long cap;

	/* The bounding set first: taking from it needs CAP_SETPCAP. Without that (EPERM) there is nothing
	 * to take: no_new_privs keeps an exec from gaining what is still in it. EINVAL: past the last one. */
	for (cap = 0; cap < 64; cap++)
		if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			break;
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return -errno;
	memset(none, 0, sizeof(none));
	return ret(syscall(SYS_capset, &head, none));
}

int rn_os_ticker(uint32_t ms)
{
	const struct timespec every = { ms / 1000, (long)(ms % 1000) * 1000000 };
	const struct itimerspec when = { every, every };
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), err;

	if (fd < 0)
		return -errno;
	if (timerfd_settime(fd, 0, &when, NULL) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	return fd;
}

int rn_os_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	return ret(mount(source, target, type, flags, data));
}

int rn_os_umount_detach(const char *target)
{
	return ret(umount2(target, MNT_DETACH));
}

/**
 * rn_tap_open() - Make a tap interface in the caller's network namespace
 * @name:	Interface name, 1..15 bytes; the caller has seen that it is not taken
 * @failed:	Set to the step that failed
 *
 * Return: descriptor, or -EACCES, -ENOENT (RN_TAP_OPEN), -EPERM, -EBUSY, -EINVAL (RN_TAP_CREATE)
 */
int rn_tap_open(const char *name, int *failed)
{
	struct ifreq ifr;
	int hdr = (int)RN_VNET_HLEN, le = 1, fd, err;

	*failed = RN_TAP_OPEN;
	if (strlen(name) == 0 || strlen(name) >= IFNAMSIZ)
		return -EINVAL;
	fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return -errno;
	memset(&ifr, 0, sizeof(ifr));
	memcpy(ifr.ifr_name, name, strlen(name));
	ifr.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
	*failed = RN_TAP_CREATE;
	if (ioctl(fd, TUNSETIFF, &ifr) < 0)
		goto fail;
	*failed = RN_TAP_SETUP;
	if (ioctl(fd, TUNSETVNETHDRSZ, &hdr) < 0 || ioctl(fd, TUNSETVNETLE, &le) < 0 ||
	    ioctl(fd, TUNSETOFFLOAD, (unsigned long)(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)) < 0)
		goto fail;
	return fd;
fail:
	err = errno;
	close(fd);
	return -err;
}
