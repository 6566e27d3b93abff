/* fast_bound.c - host to guest, when many flows receive at once: how much of the host's memory their sockets may take.
 *
 * The kernel lets a socket's receive buffer grow with what its sender could use, to tcp_rmem[2] (6 or 32 MiB), and frees
 * nothing of it before we read. A thousand senders that are faster than the way to the guest fill all of them, until TCP's
 * memory of the whole host is used up (tcp_mem, tcp(7)); then segments are dropped, and who gets on is who had no loss.
 * Measured: 5 to 20 Gbit/s by chance, with thousands of retransmission timeouts a second.
 *
 * So among MANY receivers (rn_crowd.h) a socket's buffer is set to a share of TOTAL; that takes it out of the kernel's
 * hands (SOCK_RCVBUF_LOCK), which is undone when the crowd is over, or the socket is egress's. MANY is far more than what a
 * download manager opens: a share of LEAST still is 10 Mbit/s each over 100 ms. net.core.rmem_max may make it less.
 *
 * system calls: getsockopt, setsockopt
 */
#include "fast_down_internal.h"

#include <sys/socket.h>

#define MANY 256u /* flows */
#define TOTAL (1u << 30)
#define MOST (1u << 20)
#define LEAST (128u << 10)

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72 /* Linux 5.15; without it nothing is bound, as it could not be undone */
#endif
#define RCVBUF_LOCK 2 /* SOCK_RCVBUF_LOCK */

void fast_bound_init(struct fast_down *d)
{
	d->crowd.many = MANY;
}

static void bind_buffer(struct fast_down *d, struct down_flow *q)
{
	int lock, size = (int)(TOTAL / (d->n ? d->n : 1));
	socklen_t l = sizeof(lock);

	size = size > (int)MOST ? (int)MOST : size < (int)LEAST ? (int)LEAST : size;
	if (getsockopt(q->fd, SOL_SOCKET, SO_BUF_LOCK, &lock, &l) || (lock & RCVBUF_LOCK) ||
	    setsockopt(q->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)))
		return; /* it is as large as it may be, then */
	q->bound = 1;
	d->s->c[RN_C_now_tcp_bounded]++;
}

void fast_bound_lift(struct fast_down *d, struct down_flow *q)
{
	int lock;
	socklen_t l = sizeof(lock);

	if (RN_LIKELY(!q->bound))
		return;
	q->bound = 0;
	d->s->c[RN_C_now_tcp_bounded]--;
	if (getsockopt(q->fd, SOL_SOCKET, SO_BUF_LOCK, &lock, &l))
		return;
	lock &= ~RCVBUF_LOCK;
	(void)setsockopt(q->fd, SOL_SOCKET, SO_BUF_LOCK, &lock, sizeof(lock));
}

void fast_bound_taken(struct fast_down *d, struct down_flow *q, uint32_t n)
{
	(void)rn_crowd_sent(&d->crowd, &q->crowd, n, d->s->now);
	if (RN_LIKELY(d->crowd.crowded == q->bound))
		return;
	if (d->crowd.crowded)
		bind_buffer(d, q);
	else
		fast_bound_lift(d, q);
}
