/* fast_train.c - TCP segments of promoted flows, guest to host: which are taken, and how they go to the host.
 *
 * Taken is what a settled connection sends nearly always: ACK or ACK+PSH without options, at rcv_nxt, inside the window,
 * acknowledging what was sent. rcv_nxt advances by what the host socket took (I1). A segment with nothing new in it is to be
 * answered. Everything else is egress's.
 *
 * Trains. A sender with an open window sends one super-frame behind the other, and a call of sendmsg() for each costs a lock,
 * a look whether to transmit, and a wake of who reads at the other end. So segments of LEAST bytes and more are held, in the
 * buffers that the link put them into, while there are more to read; those of a flow go to its socket in one call. Of a flow
 * no more than BYTES are: what was read must still be in the second-level cache when it is sent. Nothing of a flow overtakes
 * what is held of it, and nothing is held past the end of a turn.
 *
 * system calls: sendto, sendmsg
 */
#include "fast_up_internal.h"

#include <errno.h>
#include <sys/socket.h>

#define MISSES 8u
#define LEAST 1024u /* frame, bytes: less is a message that somebody waits for */
#define BYTES (512u << 10) /* of a flow */

enum verdict { EGRESS, TAKEN, DATA };

/* The owner of down waits for what was posted: tell it. fast_up_open() saw room for one a frame. */
static void wake_down(struct fast_up *u, uint32_t i, struct rn_flow *f)
{
	if (rn_acks_wake(&f->acks))
		rn_stage_notice(u->s, RN_ROLE_GUEST, rn_fn_flags(RN_FN_ACKS), i, f->gen);
}

/**
 * segment() - What becomes of one segment of a flow that is here, the half claimed
 * @rcv_nxt:	What comes next, when the segments before it are sent
 * @lost:	Set to 1: egress has to read its acknowledgment as well
 */
static enum verdict segment(struct fast_up *u, uint32_t i, struct rn_flow *f, const struct fast_frame *h, uint32_t rcv_nxt, int *lost)
{
	struct fast_flow *ff = &u->flow[i];
	const uint8_t *th = h->eth + h->p.l4_off;
	uint32_t seq = rn_get32(th + RN_TCP_SEQ), ack = rn_get32(th + RN_TCP_ACK), len = h->p.payload_len;
	uint32_t wnd = (uint32_t)rn_get16(th + RN_TCP_WND) << rn_tcp_shift(f->down.wscale);
	uint64_t known = atomic_load_explicit(&f->acks.ack_wnd, memory_order_relaxed);
	int32_t ahead = (int32_t)(ack - rn_acks_ack(known));
	int old = SEQ_LT(seq, rcv_nxt) && !SEQ_GT(seq + len, rcv_nxt);

	*lost = 0;
	if (!old && (seq != rcv_nxt || SEQ_GT(seq + len, f->up.rcv_adv))) {
		if (SEQ_GT(seq, rcv_nxt) && ++ff->misses >= MISSES && u->barrier == NONE && !u->barrier_until) {
			u->barrier = i;
			ff->misses = 0;
		}
		return EGRESS;
	}
	/* Acknowledgment: new, or nothing new with data (RFC 5681 2: without it is a duplicate). Acquire: what was sent is
	 * shown before it is written to the link, so the guest cannot be ahead of what we see. */
	if ((ahead < 0 && !old) || SEQ_GT(ack, __atomic_load_n(&f->down.snd_max, __ATOMIC_ACQUIRE)))
		return EGRESS;
	if (!old && !ahead && !len && wnd == rn_acks_wnd(known))
		return EGRESS;
	if (old ? ahead > 0 : ahead || wnd != rn_acks_wnd(known)) { /* an old segment's window may be old */
		uint32_t owner = atomic_load_explicit(&f->down.owner, memory_order_relaxed);

		if ((owner & ~RN_OWNER_BUSY) != u->rx)
			return EGRESS; /* it has down, and reads the segment itself */
		rn_acks_post(&f->acks, ack, wnd, u->s->now, 1);
		wake_down(u, i, f); /* with the fence that the look at the owner needs (egress: seize, fence, read acks) */
		owner = atomic_load_explicit(&f->down.owner, memory_order_relaxed);
		*lost = (owner & ~RN_OWNER_BUSY) != u->rx; /* taken in between: egress may have read acks before the post */
	}
	ff->misses = 0;
	RN_SHOW(f->up.fast, f->up.fast + 1);
	if (!old)
		return len ? DATA : TAKEN;
	/* A probe of a window (RFC 9293 3.8.6.1) or of our life (3.8.4), or sent once more without need: to be answered. */
	u->s->c[RN_C_tcp_duplicate_segments]++;
	ff->asked = 1;
	ff->dup_lo = seq;
	ff->dup_hi = seq + len;
	fast_up_owe(u, i);
	return TAKEN;
}

/* Bytes that the host socket took. */
static uint32_t to_host(struct fast_up *u, struct rn_flow *f, int fd, struct iovec *iov, uint32_t n)
{
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = n };
	ssize_t took;

	do
		took = n == 1 ? send(fd, iov->iov_base, iov->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
			      : sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (took < 0 && errno == EINTR);
	u->s->c[RN_C_tcp_fast_sends]++;
	if (took >= 0)
		return (uint32_t)took;
	if (errno != EAGAIN && errno != ENOBUFS && errno != ENOMEM) /* egress gets the segment, and knows what to do */
		atomic_store_explicit(&f->acks.broke, (uint32_t)errno, memory_order_relaxed);
	return 0;
}

/* @n frames of flow @i, in the order in which they came: those that are done with are marked. */
static void take(struct fast_up *u, uint32_t i, struct fast_frame *const *frames, uint32_t n)
{
	struct fast_flow *ff = &u->flow[i];
	struct rn_flow *f = &u->flows->flow[i];
	struct fast_frame *data[FAST_TRAIN];
	struct iovec iov[FAST_TRAIN];
	uint32_t ndata = 0, len = 0, took, left;

	if (!rn_half_claim(&f->up.owner, u->me))
		return;
	for (uint32_t k = 0; k < n; k++) {
		struct fast_frame *h = frames[k];
		enum verdict v;
		int lost;

		/* The entry may be another flow's by now, with its CLOSE still in the ring; a new MAC address is for egress. */
		if (RN_UNLIKELY(f->gen != ff->gen || memcmp(h->eth + 6, f->guest_mac, 6)))
			continue;
		v = segment(u, i, f, h, f->up.rcv_nxt + len, &lost);
		if (v == EGRESS)
			continue;
		h->done = !lost;
		if (v == DATA) {
			iov[ndata] = (struct iovec){ h->eth + h->p.payload_off, h->p.payload_len };
			data[ndata++] = h;
			len += h->p.payload_len;
		}
		RN_SHOW(f->last_ns, u->s->now);
	}
	took = left = ndata ? to_host(u, f, ff->fd, iov, ndata) : 0;
	for (uint32_t k = 0; k < ndata; k++) {
		if (RN_UNLIKELY(left < data[k]->p.payload_len)) {
			data[k]->done = 0;
			left = 0;
		} else {
			left -= data[k]->p.payload_len;
		}
	}
	if (ndata) {
		RN_SHOW(f->up.rcv_nxt, f->up.rcv_nxt + took); /* I1 */
		f->up.bytes += took;
		f->up.packets += ndata;
		u->s->c[RN_C_tcp_fast_up_bytes] += took;
		if (RN_UNLIKELY(took < len)) {
			ff->tight = 1;
			ff->sndbuf = 0; /* it grows with what did not fit */
		} else {
			fast_up_owe(u, i);
		}
	}
	rn_half_leave(&f->up.owner, took < len ? u->egress : u->me);
	for (uint32_t k = 0; k < n; k++)
		u->s->c[RN_C_fast_frames] += frames[k]->done;
}

int fast_train_look(const uint8_t *eth, uint32_t len)
{
	const uint8_t *th = eth + RN_ETH_HLEN + RN_IP4_HLEN;

	return len >= RN_ETH_HLEN + RN_IP4_HLEN + RN_TCP_HLEN && (th[RN_TCP_FLAGS] & (uint8_t)~RN_TH_PSH) == RN_TH_ACK &&
	       th[RN_TCP_OFF] >> 4 == RN_TCP_HLEN / 4;
}

int fast_train_take(struct fast_up *u, uint32_t i, uint8_t *eth, const struct rn_parsed *p)
{
	struct fast_frame one = { .eth = eth, .p = *p, .flow = i }, *const only = &one;

	take(u, i, &only, 1);
	return one.done;
}

int fast_train_long(uint32_t len)
{
	return len >= LEAST;
}

void fast_train_hold(struct fast_up *u, uint32_t i, const struct fast_frame *h)
{
	u->held[u->nheld] = *h;
	u->held[u->nheld++].flow = i;
	u->flow[i].held += h->len;
	u->long_train |= u->flow[i].held >= BYTES;
}

int fast_up_full(const struct fast_up *u)
{
	return u->nheld == FAST_TRAIN || u->long_train;
}

uint32_t fast_up_settle(struct fast_up *u, const struct fast_frame **frames)
{
	uint32_t n = u->nheld;

	for (uint32_t k = 0; k < n; k++) {
		struct fast_frame *train[FAST_TRAIN];
		uint32_t i = u->held[k].flow, len = 0;

		if (!u->flow[i].held)
			continue;
		for (uint32_t j = k; j < n; j++)
			if (u->held[j].flow == i)
				train[len++] = &u->held[j];
		u->flow[i].held = 0;
		take(u, i, train, len);
	}
	u->nheld = 0;
	u->long_train = 0;
	*frames = u->held;
	return n;
}
