/* stage_loop.c - rn_stage_run() with stages made for the purpose; one check a command-line word.
 *
 * relay: source -> relay -> sink as three threads, each a whole stage, over rings and an arena so small that
 * every turn ends for want of room or buffers. The others run one stage in the main thread.
 */
#include "rn_stage.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define FRAMES 30000u
#define SLOTS 8u

static const struct rn_part_spec parts[3] = { { .nsmall = 6 }, { .nsmall = 2 }, { 0 } };

struct node {
	uint32_t n;	     /* frames moved */
	uint32_t extra;	     /* relay: frames of its own made */
	uint64_t alarm;	     /* deadline */
	uint32_t fired, events;
	int busy;	     /* turn() always says it worked */
	int sink;
	int done;
};

static void *ring_mem[2], *arena_mem, *session_mem;
static uint64_t ring_size, arena_size;
static int bells[3], control[3][2];

#define NEED(ok)                                                                                    \
	do {                                                                                        \
		if (!(ok)) {                                                                        \
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #ok, strerror(errno));      \
			_exit(2);                                                                   \
		}                                                                                   \
	} while (0)

static void *memory(uint64_t size)
{
	size = (size + RN_CACHE_LINE - 1) / RN_CACHE_LINE * RN_CACHE_LINE;
	void *mem = aligned_alloc(RN_CACHE_LINE, size);

	NEED(mem);
	return memset(mem, 0, size);
}

static void make_objects(void)
{
	ring_size = rn_ring_size(SLOTS);
	arena_size = rn_arena_size(parts, 3);
	for (int i = 0; i < 2; i++) {
		ring_mem[i] = memory(ring_size);
		NEED(!rn_ring_create(ring_mem[i], ring_size, SLOTS));
	}
	arena_mem = memory(arena_size);
	NEED(!rn_arena_create(arena_mem, arena_size, parts, 3));
	session_mem = memory(rn_session_size());
	NEED(!rn_session_create(session_mem, rn_session_size(), 3));
	for (int i = 0; i < 3; i++) {
		NEED((bells[i] = rn_bell_new()) >= 0);
		NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, control[i]));
	}
}

static struct rn_stage *make_stage(uint32_t row)
{
	struct rn_stage *s = rn_stage_new(row, 1);

	NEED(s);
	NEED(!rn_stage_set_session(s, session_mem, rn_session_size()));
	NEED(!rn_stage_set_arena(s, arena_mem, arena_size, row < 2));
	if (row > 0) /* rings before doorbells here, doorbells before rings below: both orders must do */
		NEED(!rn_stage_add_input(s, ring_mem[row - 1], ring_size, row - 1));
	for (uint32_t i = 0; i < 3; i++)
		NEED(!rn_stage_set_bell(s, i, bells[i]));
	if (row < 2)
		NEED(!rn_stage_add_output(s, RN_ROLE_CLASSIFY, ring_mem[row], ring_size, row + 1));
	NEED(!rn_stage_set_control(s, control[row][1]));
	return s;
}

static int source_turn(struct rn_stage *s)
{
	struct node *me = s->priv;
	int did = 0;

	while (me->n < FRAMES) {
		struct rn_buf *b;

		if (!rn_stage_room(s, RN_ROLE_CLASSIFY, 1))
			break;
		b = rn_buf_alloc(&s->pool, RN_SMALL);
		if (!b) {
			s->want_buf = 1;
			break;
		}
		uint8_t *eth = (uint8_t *)b + RN_BUF_ETH_OFF;

		memcpy(eth + 14, &me->n, sizeof(me->n));
		rn_stage_emit(s, RN_ROLE_CLASSIFY, b, eth, 60, 0);
		me->n++;
		did = 1;
	}
	return did;
}

static int source_drained(struct rn_stage *s)
{
	return ((struct node *)s->priv)->n == FRAMES;
}

/* Passes everything on, and puts a frame of its own behind every fourth: needs room for both and a buffer,
 * or touches nothing. */
static int relay_turn(struct rn_stage *s)
{
	struct node *me = s->priv;
	int did = 0;

	while (rn_stage_peek(s, 0, 1)) {
		struct rn_desc d = rn_ring_at(&s->in[0], 0);
		struct rn_buf *b = rn_buf_of(&s->pool, &d), *own = NULL;
		int room = rn_stage_room(s, RN_ROLE_CLASSIFY, 2);

		NEED(b);
		if (room < 2) {
			s->want_room[RN_ROLE_CLASSIFY] = 1;
			s->hold_input = 1;
			break;
		}
		if (me->n % 4 == 3) {
			own = rn_buf_alloc(&s->pool, RN_SMALL);
			if (!own) {
				s->want_buf = 1;
				s->hold_input = 1;
				break;
			}
		}
		rn_stage_emit(s, RN_ROLE_CLASSIFY, b, s->pool.base + d.off, d.len, d.flags);
		if (own) {
			memset((uint8_t *)own + RN_BUF_ETH_OFF, 0xee, 60);
			rn_stage_emit(s, RN_ROLE_CLASSIFY, own, (uint8_t *)own + RN_BUF_ETH_OFF, 60, RN_DESC_VNET);
			me->extra++;
		}
		rn_ring_consume(&s->in[0], 1);
		me->n++;
		did = 1;
	}
	return did;
}

static int sink_turn(struct rn_stage *s)
{
	struct node *me = s->priv;
	int n = rn_stage_peek(s, 0, 3);

	for (int i = 0; i < n; i++) {
		struct rn_desc d = rn_ring_at(&s->in[0], (uint32_t)i);
		struct rn_buf *b = rn_buf_of(&s->pool, &d);
		uint32_t number;

		NEED(b);
		NEED(atomic_load(&b->holder) == 3); /* this stage: the producer said so */
		memcpy(&number, s->pool.base + d.off + 14, sizeof(number));
		if (d.flags & RN_DESC_VNET) {
			NEED(number == 0xeeeeeeee);
			me->extra++;
		} else {
			NEED(number == me->n);
			NEED(!memcmp(s->pool.base + d.off - RN_VNET_HLEN, "\0\0\0\0\0\0\0\0\0\0\0", RN_VNET_HLEN));
			me->n++;
		}
		rn_buf_free(&s->pool, b);
	}
	rn_ring_consume(&s->in[0], (uint32_t)n);
	return n > 0;
}

static void *run_until_drained(void *arg)
{
	struct rn_stage *s = arg;
	char message;

	for (;;) {
		switch (rn_stage_run(s)) {
		case RN_RUN_CONTROL:
			NEED(recv(control[s->row][1], &message, 1, 0) == 1);
			rn_stage_drain(s);
			break;
		case RN_RUN_DRAINED:
			return NULL;
		case RN_RUN_SIGNAL:
			break;
		default:
			fprintf(stderr, "%s\n", rn_stage_error(s));
			_exit(3);
		}
	}
}

static void relay(void)
{
	static const struct rn_stage_ops ops[3] = {
		{ .turn = source_turn, .drained = source_drained },
		{ .turn = relay_turn },
		{ .turn = sink_turn },
	};
	struct node nodes[3] = { { 0 } };
	struct rn_stage *s[3];
	pthread_t threads[3];
	uint64_t sleeps = 0, stalls = 0;

	make_objects();
	for (uint32_t i = 0; i < 3; i++) {
		s[i] = make_stage(i);
		s[i]->ops = &ops[i];
		s[i]->priv = &nodes[i];
		NEED(!pthread_create(&threads[i], NULL, run_until_drained, s[i]));
	}
	for (int i = 0; i < 3; i++) { /* cancel in data order: each is told when the one before has ended */
		NEED(send(control[i][0], "d", 1, 0) == 1);
		NEED(!pthread_join(threads[i], NULL));
	}
	for (int i = 0; i < 3; i++) {
		NEED(nodes[i].n == FRAMES);
		sleeps += rn_stage_counter(s[i], RN_C_sleeps);
		stalls += rn_stage_counter(s[i], RN_C_stalls_room) + rn_stage_counter(s[i], RN_C_stalls_buf);
	}
	NEED(nodes[1].extra == FRAMES / 4 && nodes[2].extra == FRAMES / 4);
	NEED(rn_pool_free(&s[0]->pool, RN_SMALL) == 6 && rn_pool_free(&s[1]->pool, RN_SMALL) == 2);
	NEED(sleeps > 0 && stalls > 0);
	NEED(rn_counter_read(session_mem, rn_session_size(), 0, RN_C_sleeps) == rn_stage_counter(s[0], RN_C_sleeps));
	for (int i = 0; i < 3; i++)
		rn_stage_free(s[i]);
}

static int lone_turn(struct rn_stage *s)
{
	struct node *me = s->priv;

	me->n++;
	if (s->now >= me->alarm && me->alarm) {
		me->alarm = 0;
		me->fired++;
		rn_cell_stop(session_mem, s->row);
	}
	if (me->sink)
		(void)rn_stage_peek(s, 0, 1);
	return me->busy;
}

static void lone_event(struct rn_stage *s, uint32_t tag, uint32_t index, uint32_t events)
{
	struct node *me = s->priv;

	NEED(tag == RN_TAG_OTHER && index == 7 && events & EPOLLIN);
	me->events++;
}

static uint64_t lone_deadline(struct rn_stage *s)
{
	struct node *me = s->priv;

	return me->alarm ? me->alarm : UINT64_MAX;
}

static void lone_fini(struct rn_stage *s)
{
	((struct node *)s->priv)->done++;
}

static const struct rn_stage_ops lone_ops = {
	.turn = lone_turn, .event = lone_event, .deadline = lone_deadline, .fini = lone_fini
};

static struct rn_stage *lone(struct node *me)
{
	make_objects();
	struct rn_stage *s = make_stage(1);

	s->ops = &lone_ops;
	s->priv = me;
	return s;
}

/* Control is seen by an idle stage and by one that never is; an edge told in the same breath is not lost. */
static void control_message(void)
{
	for (int busy = 0; busy < 2; busy++) {
		struct node me = { .busy = busy };
		struct rn_stage *s = lone(&me);
		int fd = eventfd(1, EFD_NONBLOCK);

		NEED(fd >= 0 && !rn_stage_watch(s, fd, EPOLLIN | EPOLLET, RN_EV(RN_TAG_OTHER, 7)));
		NEED(send(control[1][0], "x", 1, 0) == 1);
		NEED(rn_stage_run(s) == RN_RUN_CONTROL);
		NEED(me.events == 1);
		NEED(rn_stage_run(s) == RN_RUN_CONTROL); /* level: until it is read */
		NEED(me.events == 1);
		rn_stage_fini(s);
		rn_stage_free(s);
		NEED(me.done == 1);
	}
}

static void control_end(void)
{
	struct node me = { 0 };
	struct rn_stage *s = lone(&me);

	close(control[1][0]);
	NEED(rn_stage_run(s) == RN_RUN_CONTROL);
}

static void timer_then_stop(void)
{
	struct node me = { .alarm = rn_now_ns() + 3000000 };
	struct rn_stage *s = lone(&me);

	NEED(rn_stage_run(s) == RN_RUN_STOPPED);
	NEED(me.fired == 1);
}

static void *stop_it(void *arg)
{
	struct rn_cell_view view = { 0 };

	(void)arg;
	while (!view.asleep)
		NEED(!rn_cell_read(session_mem, rn_session_size(), 1, &view));
	rn_cell_stop(session_mem, 1);
	rn_bell_ring(bells[1]);
	return NULL;
}

static void stop_asleep(void)
{
	struct node me = { 0 };
	struct rn_stage *s = lone(&me);
	pthread_t other;

	NEED(!pthread_create(&other, NULL, stop_it, NULL));
	NEED(rn_stage_run(s) == RN_RUN_STOPPED);
	pthread_join(other, NULL);
}

/* A busy stage lets Python run its signal handlers now and then. */
static void busy_returns(void)
{
	struct node me = { .busy = 1 };
	struct rn_stage *s = lone(&me);

	NEED(rn_stage_run(s) == RN_RUN_SIGNAL);
}

static void impossible_tail(void)
{
	struct node me = { .sink = 1 };
	struct rn_stage *s = lone(&me);

	atomic_store(&((struct rn_ring *)ring_mem[0])->tail, 99);
	NEED(rn_stage_run(s) == RN_RUN_ERROR);
	puts(rn_stage_error(s));
}

static int output_turn(struct rn_stage *s)
{
	(void)rn_stage_room(s, RN_ROLE_CLASSIFY, SLOTS + 1);
	return 0;
}

static void impossible_head(void)
{
	static const struct rn_stage_ops ops = { .turn = output_turn };
	struct node me = { 0 };
	struct rn_stage *s = lone(&me);

	s->ops = &ops;
	atomic_store(&((struct rn_ring *)ring_mem[1])->head, 5);
	NEED(rn_stage_run(s) == RN_RUN_ERROR);
	puts(rn_stage_error(s));
}

static int failing_turn(struct rn_stage *s)
{
	return rn_fail(s, -EIO, "the %s is on fire", "printer");
}

static void turn_fails(void)
{
	static const struct rn_stage_ops ops = { .turn = failing_turn };
	struct node me = { 0 };
	struct rn_stage *s = lone(&me);

	s->ops = NULL;
	NEED(rn_stage_run(s) == RN_RUN_ERROR);
	s->ops = &ops;
	NEED(rn_stage_run(s) == RN_RUN_ERROR);
	puts(rn_stage_error(s));
}

static void bad_grants(void)
{
	struct rn_stage *s;

	make_objects();
	s = rn_stage_new(1, 1);
	NEED(rn_stage_add_output(s, RN_NROLES, ring_mem[0], ring_size, 2) == -EINVAL);
	NEED(rn_stage_add_output(s, 0, ring_mem[0], ring_size, 1) == -EINVAL);
	NEED(rn_stage_add_output(s, 0, ring_mem[0], ring_size - 1, 2) == -EMSGSIZE);
	NEED(!rn_stage_add_output(s, 0, ring_mem[0], ring_size, 2));
	NEED(rn_stage_add_output(s, 0, ring_mem[0], ring_size, 2) == -EINVAL);
	NEED(rn_stage_add_input(s, ring_mem[0], ring_size, RN_STAGES_MAX) == -EINVAL);
	NEED(rn_stage_add_input(s, arena_mem, ring_size, 0) == -EPROTO);
	NEED(strstr(rn_stage_error(s), "input ring from stage row 0"));
	for (int i = 0; i < RN_INPUTS_MAX; i++)
		NEED(!rn_stage_add_input(s, ring_mem[1], ring_size, 0));
	NEED(rn_stage_add_input(s, ring_mem[1], ring_size, 0) == -EINVAL);
	NEED(rn_stage_set_bell(s, RN_STAGES_MAX, bells[0]) == -EINVAL);
	NEED(rn_stage_set_bell(s, 1, -1) == -EINVAL);
	NEED(rn_stage_set_arena(s, session_mem, arena_size, 1) == -EPROTO);
	NEED(rn_stage_set_control(s, 9999) == -EBADF);
	rn_stage_free(s);
	rn_stage_free(NULL);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} checks[] = {
		{ "relay", relay }, { "control_message", control_message }, { "control_end", control_end },
		{ "timer_then_stop", timer_then_stop }, { "stop_asleep", stop_asleep },
		{ "busy_returns", busy_returns }, { "impossible_tail", impossible_tail },
		{ "impossible_head", impossible_head }, { "turn_fails", turn_fails }, { "bad_grants", bad_grants },
	};

	alarm(90); /* a lost wake ends here */
	for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
		if (argc == 2 && !strcmp(argv[1], checks[i].name)) {
			checks[i].run();
			puts("done");
			return 0;
		}
	return 4;
}
