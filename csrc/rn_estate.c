/* rn_estate.c - bytes and descriptors of a stage, written to and read from its estate (rn_estate.h). */
#include "rn_estate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEAD 0x52534545u /* kind of packet: the memfd comes with it, */
#define MORE 0x52534546u /* or some of the descriptors */
#define ESTATE_FDS_MAX (1u << 20) /* as NFILE_MAX in pipeline/egress.py */

struct packet {
	uint32_t kind, n; /* n of HEAD: descriptors that follow in other packets; of MORE: in this one */
	uint64_t len;	  /* of HEAD: bytes in the memfd */
};

union rights {
	char raw[CMSG_SPACE(RN_ESTATE_FDS * sizeof(int))];
	struct cmsghdr align;
};

/* --- writing --- */

/* @room items of @size become enough for @want. 0 or -1. */
static int grow(void **mem, size_t size, size_t *room, size_t want)
{
	size_t more = *room ? *room : 4096;
	void *fresh;

	while (more < want)
		more *= 2;
	fresh = realloc(*mem, more * size);
	if (!fresh)
		return -1;
	*mem = fresh;
	*room = more;
	return 0;
}

void rn_estate_put(struct rn_estate_out *o, const void *data, size_t len)
{
	void *mem = o->data;

	if (o->error || !len)
		return;
	if (o->len + len > o->room && grow(&mem, 1, &o->room, o->len + len)) {
		o->error = -ENOMEM;
		return;
	}
	o->data = mem;
	memcpy(o->data + o->len, data, len);
	o->len += len;
}

void rn_estate_put_fd(struct rn_estate_out *o, int fd)
{
	void *mem = o->fd;
	size_t room = o->fds_room;

	if (o->error)
		return;
	if (o->nfds == o->fds_room && grow(&mem, sizeof(*o->fd), &room, (size_t)o->nfds + 1)) {
		o->error = -ENOMEM;
		return;
	}
	o->fd = mem;
	o->fds_room = (uint32_t)room;
	o->fd[o->nfds++] = fd;
}

void rn_estate_out_free(struct rn_estate_out *o)
{
	if (o->data)
		explicit_bzero(o->data, o->len); /* it may hold what the guest sent, and a proxy's password */
	free(o->data);
	free(o->fd);
	memset(o, 0, sizeof(*o));
}

static int send_packet(int put, const struct packet *p, const int *fd, uint32_t n)
{
	struct packet copy = *p;
	struct iovec iov = { &copy, sizeof(copy) };
	union rights control = { .raw = { 0 } };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
			    .msg_controllen = CMSG_SPACE(n * sizeof(int)) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	ssize_t r;

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n * sizeof(int));
	memcpy(CMSG_DATA(c), fd, n * sizeof(int));
	do
		r = sendmsg(put, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

/* A memfd with these bytes, or -errno. */
static int bytes_as_file(const uint8_t *data, size_t len)
{
	int fd = memfd_create("ringnet-estate", MFD_CLOEXEC);

	if (fd < 0)
		return -errno;
	for (size_t at = 0; at < len;) {
		ssize_t n = write(fd, data + at, len - at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			int err = n < 0 ? -errno : -EIO;

			close(fd);
			return err;
		}
		at += (size_t)n;
	}
	return fd;
}

int rn_estate_send(int put, const struct rn_estate_out *o)
{
	struct packet p = { .kind = HEAD, .n = o->nfds, .len = o->len };
	int fd, r;

	if (o->error)
		return o->error;
	fd = bytes_as_file(o->data, o->len);
	if (fd < 0)
		return fd;
	r = send_packet(put, &p, &fd, 1);
	close(fd);
	for (uint32_t at = 0; !r && at < o->nfds; at += p.n) {
		p = (struct packet){ .kind = MORE, .n = o->nfds - at };
		if (p.n > RN_ESTATE_FDS)
			p.n = RN_ESTATE_FDS;
		r = send_packet(put, &p, o->fd + at, p.n);
	}
	return r;
}

/* --- reading --- */

/* The next packet, its descriptors at @fd, of which there is room for RN_ESTATE_FDS: how many came, whatever the packet
 * says; -EAGAIN: nothing lies there. @cut: 1: some could not be had. */
static int receive_packet(int take, struct packet *p, int *fd, int *cut)
{
	struct iovec iov = { p, sizeof(*p) };
	union rights control = { .raw = { 0 } };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	uint32_t n = 0;
	ssize_t r;

	do
		r = recvmsg(take, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (r < 0 && errno == EINTR);
	if (r <= 0)
		return r < 0 ? -errno : -EAGAIN; /* 0: the other end is closed, and empty */
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		uint32_t k;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		k = (uint32_t)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		if (k > RN_ESTATE_FDS - n)
			k = RN_ESTATE_FDS - n; /* cannot be: the buffer has no room for more */
		memcpy(fd + n, CMSG_DATA(c), k * sizeof(int));
		n += k;
	}
	*cut = !!(m.msg_flags & MSG_CTRUNC);
	if (r != (ssize_t)sizeof(*p) || (m.msg_flags & MSG_TRUNC))
		p->kind = 0;
	return (int)n;
}

static void close_reset(int fd)
{
	const struct linger lg = { .l_onoff = 1, .l_linger = 0 };
	int listens = 1;
	socklen_t len = sizeof(listens);

	/* Not on one that listens: what it accepts for others that hold it would be reset, too. */
	if (!getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) && !listens)
		(void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &lg, sizeof(lg));
	close(fd);
}

uint32_t rn_estate_discard(int take)
{
	int fd[RN_ESTATE_FDS], cut, n;
	uint32_t closed = 0;
	struct packet p;

	while ((n = receive_packet(take, &p, fd, &cut)) >= 0) {
		for (int k = 0; k < n; k++)
			close_reset(fd[k]);
		closed += (uint32_t)n - (n && p.kind == HEAD);
	}
	return closed;
}

/* All bytes of the memfd. Copied, so that nobody who has it too can change or cut what was checked. */
static int read_bytes(int fd, uint64_t len, struct rn_estate_in *in)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if (st.st_size < 0 || (uint64_t)st.st_size != len)
		return -EPROTO;
	in->data = malloc(len ? len : 1);
	if (!in->data)
		return -ENOMEM;
	while (in->len < len) {
		ssize_t n = pread(fd, in->data + in->len, len - in->len, (off_t)in->len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EPROTO;
		in->len += (size_t)n;
	}
	return 0;
}

int rn_estate_receive(int take, struct rn_estate_in *in)
{
	int fd[RN_ESTATE_FDS], cut = 0, n, r;
	uint32_t want;
	struct packet p = { 0 };

	memset(in, 0, sizeof(*in));
	n = receive_packet(take, &p, fd, &cut);
	if (n == -EAGAIN)
		return 0;
	if (n < 0)
		return n;
	r = cut ? -EMFILE : n != 1 || p.kind != HEAD ? -EPROTO : read_bytes(fd[0], p.len, in);
	for (int k = 0; k < n; k++)
		close_reset(fd[k]);
	want = p.n;
	if (!r && want > ESTATE_FDS_MAX)
		r = -EPROTO;
	if (!r && want && !(in->fd = calloc(want, sizeof(*in->fd))))
		r = -ENOMEM;
	while (!r && in->nfds < want) {
		n = receive_packet(take, &p, fd, &cut);
		if (n < 0)
			r = n == -EAGAIN ? -EPROTO : n;
		else if (cut)
			r = -EMFILE;
		else if (p.kind != MORE || p.n != (uint32_t)n || !n || (uint32_t)n > want - in->nfds)
			r = -EPROTO;
		for (int k = 0; k < n && r; k++)
			close_reset(fd[k]);
		for (int k = 0; k < n && !r; k++)
			in->fd[in->nfds++] = fd[k];
	}
	if (rn_estate_discard(take) && !r)
		r = -EPROTO; /* more than was announced */
	if (r)
		rn_estate_in_free(in);
	return r ? r : 1;
}

const void *rn_estate_view(struct rn_estate_in *in, size_t len)
{
	const uint8_t *found = in->data + in->at;

	if (len > in->len - in->at)
		return NULL;
	in->at += len;
	return found;
}

int rn_estate_get(struct rn_estate_in *in, void *to, size_t len)
{
	const void *found = rn_estate_view(in, len);

	if (!found)
		return -1;
	memcpy(to, found, len);
	return 0;
}

int rn_estate_get_fd(struct rn_estate_in *in)
{
	int fd;

	if (in->fd_at == in->nfds)
		return -1;
	fd = in->fd[in->fd_at];
	in->fd[in->fd_at++] = -1;
	return fd;
}

int rn_estate_done(const struct rn_estate_in *in)
{
	return in->at == in->len && in->fd_at == in->nfds;
}

void rn_estate_in_free(struct rn_estate_in *in)
{
	for (uint32_t k = 0; k < in->nfds; k++)
		if (in->fd[k] >= 0)
			close_reset(in->fd[k]);
	if (in->data)
		explicit_bzero(in->data, in->len);
	free(in->fd);
	free(in->data);
	memset(in, 0, sizeof(*in));
}
