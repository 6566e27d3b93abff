/* stage_vmnet.c - the second NIC's relay: frames of the guest to the host side, and back.
 *
 * The host side is one link: a tap on a bridge, or a socket to a helper that has the network. Both ways are
 * relay.c's; each goes on while the other waits. When the host side is gone (the tap deleted, the helper's socket
 * closed) the stage ends with an error that says so, and the supervisor takes the rest of NIC2 down.
 *
 * system calls: those of relay.c
 */
#include "stage_vmnet.h"

#include <errno.h>
#include <stdlib.h>

#include "relay.h"

struct stage_vmnet {
	struct relay_in down; /* host side to guest */
	struct relay_out up;  /* guest to host side */
};

static int vmnet_turn(struct rn_stage *s)
{
	struct stage_vmnet *v = s->priv;
	int up = relay_out_turn(s, &v->up), down;

	if (up < 0)
		return up;
	down = relay_in_turn(s, &v->down);
	if (v->down.gone)
		return rn_fail(s, -ENOTCONN, "the host side of the second NIC is gone");
	return up + down;
}

static void vmnet_event(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events)
{
	struct stage_vmnet *v = s->priv;

	(void)index;
	(void)events; /* whatever it is, reading and writing tell */
	if (tag != RN_TAG_LINK)
		return;
	v->down.readable = 1;
	v->up.blocked = 0;
}

/* Draining ends when the kernel has all. */
static int vmnet_drained(struct rn_stage *s)
{
	struct stage_vmnet *v = s->priv;

	return !rn_link_held(&v->up.link);
}

static void vmnet_fini(struct rn_stage *s)
{
	struct stage_vmnet *v = s->priv;

	relay_in_fini(s, &v->down);
	relay_out_fini(&v->up);
	free(v);
	s->priv = NULL;
}

static const struct rn_stage_ops vmnet_ops = {
	.turn = vmnet_turn,
	.event = vmnet_event,
	.drained = vmnet_drained,
	.fini = vmnet_fini,
};

int stage_vmnet_init(struct rn_stage *s, const struct rn_link *link, uint64_t storm)
{
	struct stage_vmnet *v;
	int err = relay_link_check(s, link);

	if (err)
		return err;
	if (s->nin != 1 || !s->has_out[RN_ROLE_GUEST])
		return rn_fail(s, -EINVAL, "vmnet: needs one input and an output to the guest");
	v = calloc(1, sizeof(*v));
	if (!v)
		return rn_fail(s, -ENOMEM, "vmnet: out of memory");
	v->up = (struct relay_out){
		.link = *link,
		.tap = RN_TAP_LINK,
		.dir = RN_PCAP_FROM_GUEST,
		.storm = { .rate = storm },
		.c = { .frames = RN_C_vmnet_up_frames, .bytes = RN_C_vmnet_up_bytes, .down = RN_C_drop_vmnet_down,
		       .failed = RN_C_drop_vmnet_write, .runt = RN_NCOUNTERS, .oversize = RN_NCOUNTERS,
		       .vnet_header = RN_NCOUNTERS, .storm = RN_C_drop_storm_up, .full = RN_C_vmnet_full },
	};
	v->down = (struct relay_in){
		.link = *link,
		.tap = RN_TAP_LINK,
		.dir = RN_PCAP_TO_GUEST,
		.role = RN_ROLE_GUEST,
		.storm = { .rate = storm },
		.c = { .frames = RN_C_vmnet_down_frames, .bytes = RN_C_vmnet_down_bytes, .down = RN_NCOUNTERS,
		       .failed = RN_C_drop_vmnet_read, .runt = RN_C_drop_vmnet_runt, .oversize = RN_C_drop_vmnet_oversize,
		       .vnet_header = RN_C_drop_vmnet_header, .storm = RN_C_drop_storm_down, .full = RN_NCOUNTERS },
	};
	err = relay_watch_both(s, &v->down, &v->up);
	if (err) {
		free(v);
		return err;
	}
	s->priv = v;
	s->ops = &vmnet_ops;
	return 0;
}
