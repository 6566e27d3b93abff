/* rn_trace.c - what a stage says of itself besides counters: its log of decisions, and how long frames take.
 *
 * The log (rn_event.h) gets an event where a stage knows whom a decision is about (rn_stage_count(), rn_stage_note()),
 * and at the end of each turn one for each counter of note that went up otherwise: so no drop, of whichever stage and
 * file, goes without a line. Of one counter NOTES_A_WINDOW events are noted in NOTE_WINDOW_NS; what comes in between is
 * told with the next one.
 *
 * One frame in RN_SAMPLE is stamped when it leaves the stage that wrote it, and again by each that hands it on. A stage
 * it comes to adds the time since the first and since the last stamp to its own row of struct rn_latency: so between any
 * two stages that a frame passes there is a histogram. A stage that hands a copy on (a bad wire, reassembly) starts anew. A
 * frame of a promoted flow passes no ring: the time it takes in its stage is that stage's with itself.
 */
#include "rn_stage.h"

#include <string.h>

#define NOTE_WINDOW_NS 50000000ull
#define NOTES_A_WINDOW 2

static void note(struct rn_stage *s, uint16_t kind, uint16_t counter, uint64_t n, const struct rn_who *who,
		 uint64_t value)
{
	struct rn_event_view ev = {
		.at_ns = s->now,
		.kind = kind,
		.counter = counter,
		.n = n > UINT32_MAX ? UINT32_MAX : (uint32_t)n,
		.flow = (uint32_t)RN_NO_FLOW,
		.value = value,
	};

	if (!s->session)
		return;
	if (who) {
		ev.flow = who->flow;
		ev.flow_gen = who->flow_gen;
		memcpy(ev.guest, who->guest, 16);
		memcpy(ev.peer, who->peer, 16);
		ev.guest_port = who->guest_port;
		ev.peer_port = who->peer_port;
		ev.proto = who->proto;
	}
	rn_event_put(&s->session->log[s->row], &ev);
}

void rn_stage_note(struct rn_stage *s, enum rn_event_kind kind, const struct rn_who *who, uint64_t value)
{
	note(s, (uint16_t)kind, RN_NO_COUNTER, 1, who, value);
}

void rn_stage_count(struct rn_stage *s, uint32_t counter, const struct rn_who *who)
{
	s->c[counter]++;
	if (!s->may_tell[counter])
		return;
	s->may_tell[counter]--;
	note(s, RN_DID_COUNT, (uint16_t)counter, s->c[counter] - s->told[counter], who, 0);
	s->told[counter] = s->c[counter];
}

/* Counters of note besides drop_*: what else goes wrong, or is why something is slow. */
static const uint16_t of_note[] = {
	RN_C_tcp_refused, RN_C_tcp_unreachable, RN_C_tcp_over_limit, RN_C_tcp_reset_by_guest, RN_C_tcp_reset_by_host,
	RN_C_tcp_closed_by_control, RN_C_tcp_timed_out, RN_C_tcp_rto, RN_C_tcp_fast_retransmit,
	RN_C_tcp_zero_window_probes, RN_C_tcp_inbound_refused, RN_C_tcp_inbound_gone, RN_C_tcp_inbound_unanswered,
	RN_C_udp_evicted, RN_C_icmp_evicted, RN_C_proxy_refused, RN_C_proxy_failed, RN_C_icmp_errors_withheld,
	RN_C_dns_servfail, RN_C_dhcp_naks, RN_C_impair_dropped,
};

static void find_notable(struct rn_stage *s)
{
	s->nnotable = 0;
	for (uint32_t i = 0; i < RN_NCOUNTERS; i++) {
		int is = !strncmp(rn_counter_name(i), "drop_", 5);

		for (uint32_t k = 0; !is && k < sizeof(of_note) / sizeof(of_note[0]); k++)
			is = of_note[k] == i;
		if (is)
			s->notable[s->nnotable++] = (uint16_t)i;
	}
}

/* A generation begins to count where the last one stopped. */
void rn_trace_begin(struct rn_stage *s)
{
	find_notable(s);
	memcpy(s->told, s->c, sizeof(s->told));
	memset(s->may_tell, NOTES_A_WINDOW, sizeof(s->may_tell));
	rn_stage_note(s, RN_DID_START, NULL, s->generation);
}

/* End of a turn: counters of note that went up without a word about whom are told by how much. */
void rn_trace_counters(struct rn_stage *s)
{
	if (s->now - s->window_ns >= NOTE_WINDOW_NS) {
		s->window_ns = s->now;
		memset(s->may_tell, NOTES_A_WINDOW, sizeof(s->may_tell));
	}
	for (uint32_t k = 0; k < s->nnotable; k++) {
		uint32_t i = s->notable[k];

		if (RN_LIKELY(s->c[i] == s->told[i]) || !s->may_tell[i])
			continue;
		s->may_tell[i]--;
		note(s, RN_DID_COUNT, (uint16_t)i, s->c[i] - s->told[i], NULL, 0);
		s->told[i] = s->c[i];
	}
}

/* --- how long frames take --- */

/* A frame leaves: one in RN_SAMPLE gets its first stamp here, one that has one a later one. */
void rn_trace_stamp(struct rn_stage *s, struct rn_buf *b)
{
	if (!b->first_ns) {
		if (++s->samples % RN_SAMPLE)
			return;
		b->first_ns = rn_now_ns();
		b->first_row = (uint8_t)s->row;
		b->last_ns = b->first_ns;
	} else {
		b->last_ns = rn_now_ns();
	}
	b->last_row = (uint8_t)s->row;
}

static void took(struct rn_stage *s, uint32_t from, uint64_t ns)
{
	_Atomic uint64_t *n = &s->session->latency[s->row][from].bucket[rn_latency_bucket(ns)];

	/* Ours alone to write. */
	atomic_store_explicit(n, atomic_load_explicit(n, memory_order_relaxed) + 1, memory_order_relaxed);
}

void rn_stage_arrived(struct rn_stage *s, const struct rn_buf *b)
{
	/* Copies: another stage can write there. */
	uint64_t first = b->first_ns, last = b->last_ns, now = rn_now_ns();
	uint32_t first_row = b->first_row, last_row = b->last_row;

	if (!s->session || first > now || last > now || first_row >= RN_STAGES_MAX || last_row >= RN_STAGES_MAX)
		return;
	took(s, first_row, now - first);
	if (last_row != first_row)
		took(s, last_row, now - last);
}

void rn_stage_inline_end(struct rn_stage *s, uint64_t began)
{
	if (s->session)
		took(s, s->row, rn_now_ns() - began);
}
