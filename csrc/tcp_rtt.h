/* tcp_rtt.h - round-trip time and retransmission timeout (RFC 6298). */
#ifndef RN_TCP_RTT_H
#define RN_TCP_RTT_H

#include "rn_flow.h"

#define TCP_RTO_INIT_US 1000000u /* RFC 6298 2.1 */
#define TCP_RTO_MIN_US 200000u	 /* below RFC 6298 2.4's 1 s, as Linux: the link has no delay of its own */
#define TCP_RTO_MAX_US 60000000u /* RFC 6298 2.5 */

/* A segment sent once was acknowledged @ns after it was sent (RFC 6298 2.2, 2.3): srtt_us, rttvar_us and rto_us of the
 * caller's half. */
void tcp_rtt_sample(struct rn_flow *f, uint64_t ns);

#endif
