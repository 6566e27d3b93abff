/* policy.h - which destinations the guest may call, and who may call the guest: what the protocols need of it.
 *
 * What it is and how it works stands in policy.c.
 */
#ifndef RN_POLICY_H
#define RN_POLICY_H

#include "egress.h"

/* CFFI BEGIN */
#define POLICY_RULES_MAX 1024
#define POLICY_OUT 1 /* what the guest begins: the other side is its destination */
#define POLICY_IN 2  /* what comes through a forward: the other side is the client */
#define POLICY_TCP 1
#define POLICY_UDP 2
#define POLICY_ICMP 4

struct policy_rule {
	uint8_t net[16];  /* of the other side; IPv4 mapped (RFC 4291 2.5.5.2) */
	uint32_t prefix;  /* 0..128: IPv4's and 96 */
	uint16_t port_min, port_max; /* that is called: the destination's, or the guest's; 0..65535: any */
	uint8_t ways;	  /* POLICY_OUT, POLICY_IN: bits */
	uint8_t protos;	  /* POLICY_TCP ...: bits */
	uint8_t deny;	  /* 1 deny, 0 allow */
	uint32_t name;	  /* what a refusal calls it */
};
/* From now on these rules, in this order, instead of any before: 0, or -EINVAL (a rule that says nothing), -E2BIG,
 * -ENOMEM; then the old ones hold. Flows that exist live on. */
int stage_egress_policy(struct rn_stage *s, const struct policy_rule *rule, uint32_t n);
/* For tests: the name of the rule that denies this, or -1. */
int32_t stage_egress_policy_verdict(struct rn_stage *s, uint32_t way, uint8_t proto, const uint8_t other[16],
				    uint16_t port);
/* CFFI END */

void policy_fini(struct egress *e);
/* policy_denied_out() and _in() where there are rules. */
int policy_refuses(struct egress *e, uint32_t way, uint8_t proto, const uint8_t guest[16], uint16_t gport,
		   const uint8_t other[16], uint16_t port);

/* May the guest not begin this? Then it is counted and told; the caller refuses. @other: as the guest calls it. */
static inline int policy_denied_out(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport,
				    const uint8_t other[16], uint16_t port)
{
	return RN_UNLIKELY(e->policy != NULL) && policy_refuses(e, POLICY_OUT, proto, guest, gport, other, port);
}

/* May this client not call the guest's port? @other: as the host knows it. */
static inline int policy_denied_in(struct egress *e, uint8_t proto, const uint8_t guest[16], uint16_t gport,
				   const uint8_t other[16], uint16_t port)
{
	return RN_UNLIKELY(e->policy != NULL) && policy_refuses(e, POLICY_IN, proto, guest, gport, other, port);
}

#endif
