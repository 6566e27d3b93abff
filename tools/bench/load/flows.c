/* flows.c - many TCP connections: all of one side send as fast as they can, or nobody says a word.
 *
 * Both sides are the same but for how they get their connections. Orders:
 *   send     begin to send on every connection
 *   stop     send no more
 *   mark     count from here
 *   report   bytes received since mark, by how many flows, and how evenly (Jain's index:
 *            (sum x)^2 / (n sum x^2), 1 when all got the same, 1/n when one got all)
 *   count    how many connections there are
 */
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define FLOWS_MAX 100000u
#define CHUNK 65536u
#define IN_FLIGHT 64u /* connects under way at once */
#define CONNECT_S 20u /* then it tells how many it has */
#define EV_STDIN UINT32_MAX
#define EV_LISTEN (UINT32_MAX - 1)

struct flow {
	int fd;
	int up; /* connected */
	uint64_t got, base;
};

static struct {
	int ep, listener;
	struct flow *f;
	uint32_t n, alive, pending, refused;
	int sending;
	uint64_t marked;
	uint8_t out[CHUNK], in[4 * CHUNK];
} w;

static void watch(int op, int fd, uint32_t events, uint32_t index)
{
	struct epoll_event e = { .events = events, .data.u32 = index };

	if (epoll_ctl(w.ep, op, fd, &e))
		die(errno, "epoll_ctl");
}

static uint32_t wanted(void)
{
	return w.sending ? EPOLLIN | EPOLLOUT : EPOLLIN;
}

static void add(int fd, int up)
{
	/* At our end they are reset: a thousand that the kernel goes on sending would be in the next row's way. */
	const struct linger at_once = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	if (w.n == FLOWS_MAX)
		die(0, "over %u connections", FLOWS_MAX);
	w.f[w.n] = (struct flow){ .fd = fd, .up = up };
	watch(EPOLL_CTL_ADD, fd, up ? wanted() : EPOLLOUT, w.n);
	w.n++;
	if (up)
		w.alive++;
	else
		w.pending++;
}

static void gone(struct flow *f)
{
	close(f->fd);
	f->fd = -1;
	if (f->up)
		w.alive--;
	else
		w.pending--;
	f->up = 0;
}

static void accept_some(void)
{
	for (int i = 0; i < 64; i++) {
		int fd = accept4(w.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd < 0)
			return;
		add(fd, 1);
	}
}

static void set_sending(int on)
{
	w.sending = on;
	for (uint32_t i = 0; i < w.n; i++)
		if (w.f[i].up)
			watch(EPOLL_CTL_MOD, w.f[i].fd, wanted(), i);
}

static void report(void)
{
	double sum = 0, squares = 0, seconds = (double)(now_ns() - w.marked) / 1e9;
	uint64_t least = UINT64_MAX, most = 0;
	uint32_t n = 0;

	for (uint32_t i = 0; i < w.n; i++) {
		uint64_t x = w.f[i].got - w.f[i].base;

		if (!w.f[i].up)
			continue;
		n++;
		sum += (double)x;
		squares += (double)x * (double)x;
		least = x < least ? x : least;
		most = x > most ? x : most;
	}
	tell("{\"flows\": %u, \"seconds\": %.6f, \"bytes\": %.0f, \"jain\": %.6f, \"least\": %llu, \"most\": %llu}", n, seconds,
	     sum, squares > 0 ? sum * sum / ((double)n * squares) : 0.0, (unsigned long long)(n ? least : 0),
	     (unsigned long long)most);
}

static void order(void)
{
	char line[LOAD_ORDER_MAX];

	if (!next_order(line))
		exit(0);
	if (!strcmp(line, "send")) {
		set_sending(1);
	} else if (!strcmp(line, "stop")) {
		set_sending(0);
	} else if (!strcmp(line, "mark")) {
		for (uint32_t i = 0; i < w.n; i++)
			w.f[i].base = w.f[i].got;
		w.marked = now_ns();
	} else if (!strcmp(line, "report")) {
		report();
		return;
	} else if (!strcmp(line, "count")) {
		tell("{\"flows\": %u}", w.alive);
		return;
	} else {
		die(0, "order '%s' is not known", line);
	}
	tell("ok");
}

static void flow_event(uint32_t i, uint32_t events)
{
	struct flow *f = &w.f[i];

	if (f->fd < 0)
		return; /* closed earlier in this batch */
	if (!f->up) {
		int err = 0;
		socklen_t l = sizeof(err);

		getsockopt(f->fd, SOL_SOCKET, SO_ERROR, &err, &l);
		if (err) {
			w.refused++;
			gone(f);
			return;
		}
		f->up = 1;
		w.pending--;
		w.alive++;
		watch(EPOLL_CTL_MOD, f->fd, wanted(), i);
		return;
	}
	if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
		ssize_t n = recv(f->fd, w.in, sizeof(w.in), 0);

		if (n == 0 || (n < 0 && errno != EAGAIN)) {
			gone(f);
			return;
		}
		if (n > 0)
			f->got += (uint64_t)n;
	}
	if ((events & EPOLLOUT) && w.sending && send(f->fd, w.out, sizeof(w.out), 0) < 0 && errno != EAGAIN)
		gone(f);
}

static void turn(int wait_ms)
{
	struct epoll_event ev[256];
	int n = epoll_wait(w.ep, ev, 256, wait_ms);

	for (int i = 0; i < n; i++) {
		if (ev[i].data.u32 == EV_STDIN)
			order();
		else if (ev[i].data.u32 == EV_LISTEN)
			accept_some();
		else
			flow_event(ev[i].data.u32, ev[i].events);
	}
}

static void set_up(void)
{
	w.ep = epoll_create1(EPOLL_CLOEXEC);
	w.f = calloc(FLOWS_MAX, sizeof(*w.f));
	if (w.ep < 0 || !w.f)
		die(errno, "epoll");
	w.marked = now_ns();
}

int mode_flows_listen(int argc, char **argv)
{
	struct sockaddr_in at = address(argv[1], argv[2]);

	(void)argc;
	set_up();
	w.listener = listen_on(&at);
	watch(EPOLL_CTL_ADD, w.listener, EPOLLIN, EV_LISTEN);
	watch(EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, EV_STDIN);
	tell("ready");
	for (;;)
		turn(-1);
}

int mode_flows_connect(int argc, char **argv)
{
	struct sockaddr_in to = address(argv[1], argv[2]);
	uint32_t want = (uint32_t)number(argv[3], 1, FLOWS_MAX, "connections"), asked = 0;
	uint64_t began = now_ns();

	(void)argc;
	set_up();
	while (asked < want || w.pending) {
		while (asked < want && w.pending < IN_FLIGHT) {
			int fd = tcp_socket(1);

			asked++;
			if (connect(fd, (struct sockaddr *)&to, sizeof(to)) && errno != EINPROGRESS) {
				w.refused++;
				close(fd);
				continue;
			}
			add(fd, 0);
		}
		turn(1000);
		if (now_ns() - began > CONNECT_S * 1000000000ull)
			break;
	}
	tell("{\"flows\": %u, \"refused\": %u, \"seconds\": %.6f}", w.alive, w.refused, (double)(now_ns() - began) / 1e9);
	watch(EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, EV_STDIN);
	for (;;)
		turn(-1);
}
