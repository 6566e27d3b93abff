/* tcp_rtt.c - round-trip time and retransmission timeout of a flow (RFC 6298), whoever owns its half. */
#include "tcp_rtt.h"

/* RFC 6298 2.2, 2.3 */
void tcp_rtt_sample(struct rn_flow *f, uint64_t ns)
{
	uint32_t r = (uint32_t)(ns / 1000u), rto;

	if (!f->down.srtt_us) {
		f->down.srtt_us = r ? r : 1;
		f->down.rttvar_us = r / 2;
	} else {
		uint32_t d = r > f->down.srtt_us ? r - f->down.srtt_us : f->down.srtt_us - r;

		f->down.rttvar_us = f->down.rttvar_us - f->down.rttvar_us / 4 + d / 4;
		f->down.srtt_us = f->down.srtt_us - f->down.srtt_us / 8 + r / 8;
	}
	rto = f->down.srtt_us + 4 * f->down.rttvar_us;
	f->down.rto_us = rto < TCP_RTO_MIN_US ? TCP_RTO_MIN_US : rto > TCP_RTO_MAX_US ? TCP_RTO_MAX_US : rto;
}
