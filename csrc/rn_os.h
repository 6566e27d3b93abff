/* rn_os.h - the Linux calls Python 3.11 has no name for: namespaces, prctl, capabilities, tap.
 *
 * Each is the call and nothing else. Control plane only; no state. All return 0 (or a descriptor) or a
 * negative errno.
 */
#ifndef RN_OS_H
#define RN_OS_H

#include <stdint.h>

/* CFFI BEGIN */
#define RN_CLONE_NEWNS 0x00020000
#define RN_CLONE_NEWUSER 0x10000000
#define RN_CLONE_NEWPID 0x20000000
#define RN_CLONE_NEWNET 0x40000000

int rn_os_unshare(int flags);	    /* unshare(2) */
int rn_os_setns(int fd, int nstype); /* setns(2) */
/* Kind of namespace behind an nsfs descriptor (RN_CLONE_*), ioctl_ns(2); -ENOTTY: it is no namespace. */
int rn_os_ns_type(int fd);
/* The user namespace that owns the one behind @fd, as a new descriptor (close-on-exec). -EPERM: it is
 * outside the caller's own. */
int rn_os_ns_owner(int fd);

int rn_os_pdeathsig(int sig);	      /* prctl(2): @sig when the thread that forked us ends */
int rn_os_no_new_privs(void);	      /* prctl(2) */
int rn_os_set_name(const char *name); /* prctl(2): 15 bytes count; what ps and top show */
int rn_os_subreaper(int on);	      /* prctl(2): orphans below us become our children; before: 0 or 1 */
/* Empty effective, permitted, inheritable, ambient and bounding sets: capabilities(7). */
int rn_os_drop_caps(void);

/* timerfd_create(2): a descriptor that is readable every @ms milliseconds. Non-blocking, close-on-exec. */
int rn_os_ticker(uint32_t ms);

/* mount(2) and umount2(2); @type, @data may be NULL. Flags are those of <sys/mount.h>: */
#define RN_MS_RDONLY 1
#define RN_MS_NOSUID 2
#define RN_MS_NODEV 4
#define RN_MS_NOEXEC 8
#define RN_MS_BIND 4096
#define RN_MS_REC 16384
#define RN_MS_SLAVE 524288
int rn_os_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
int rn_os_umount_detach(const char *target);

/* Make tap @name in the caller's network namespace: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, a 12-byte
 * little-endian virtio-net header, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6. Non-blocking, close-on-exec, not
 * persistent. @failed is set to the step that failed: enum rn_tap_step. Returns the descriptor. */
enum rn_tap_step { RN_TAP_OPEN = 0, RN_TAP_CREATE, RN_TAP_SETUP };
int rn_tap_open(const char *name, int *failed);
/* CFFI END */
#endif
