/* proxy_handshake.c - the client's half of HTTP CONNECT (RFC 9110 9.3.6, RFC 9112) and of SOCKS5 (RFC 1928, RFC 1929).
 *
 * A state machine that sends what it has to say, then reads the answer, without ever blocking. What follows the
 * answer on the socket belongs to the tunnel, so no byte of it may be read here: SOCKS5 answers tell their length as
 * they come and are read exactly; of an HTTP answer a piece is peeked at, scanned up to the end of its headers, and
 * only what was scanned is taken.
 *
 * Bounds, whatever the proxy sends: a status line of 1024 bytes, 8192 bytes of headers (all interim answers
 * together); SOCKS5 answers have at most 262. Nothing of an HTTP answer is kept but its status. The deadline is the
 * caller's.
 *
 * Errors. SOCKS5's reply codes were made after errno's names, so the mapping is theirs. HTTP has no such words:
 *   401, 403, 405, 407, 451   the proxy will not: EACCES
 *   502, 503                  it did not get through: EHOSTUNREACH
 *   504, 408                  it waited in vain: ETIMEDOUT
 *   others                    ECONNREFUSED
 */
#include "proxy_handshake.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define HTTP_STATUS_MAX 1024u
#define HTTP_HEADERS_MAX 8192u
#define HTTP_PIECE 1024u	/* bytes peeked at once */
#define HTTP_STATUS_TEXT 13u	/* "HTTP/1.1 200 ": all we need of the line */

#define SOCKS_VERSION 5u	/* RFC 1928 3 */
#define SOCKS_METHOD_NONE 0u
#define SOCKS_METHOD_PASSWORD 2u
#define SOCKS_CONNECT 1u	/* RFC 1928 4 */
#define SOCKS_ASSOCIATE 3u
#define SOCKS_IPV4 1u		/* RFC 1928 5 */
#define SOCKS_NAME 3u
#define SOCKS_IPV6 4u
#define SOCKS_AUTH_VERSION 1u	/* RFC 1929 2 */

static const uint8_t mapped[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

static void put(struct proxy_handshake *h, const void *data, size_t len)
{
	/* PROXY_OUT_MAX holds the longest request; a caller that breaks the bounds of the structs gets a cut one. */
	if (len > PROXY_OUT_MAX - h->nout)
		len = PROXY_OUT_MAX - h->nout;
	memcpy(h->out + h->nout, data, len);
	h->nout += (uint32_t)len;
}

static void put_text(struct proxy_handshake *h, const char *text)
{
	put(h, text, strlen(text));
}

static void put8(struct proxy_handshake *h, uint8_t v)
{
	put(h, &v, 1);
}

/* --- HTTP --- */

/* Base64 (RFC 4648 4) of the credentials (RFC 7617 2). */
static void put_basic(struct proxy_handshake *h)
{
	static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	const struct proxy_server *s = h->server;
	uint8_t raw[255 + 1 + 255];
	uint32_t n = s->user_len;

	memcpy(raw, s->user, n);
	raw[n++] = ':';
	memcpy(raw + n, s->password, s->password_len);
	n += s->password_len;
	for (uint32_t k = 0; k < n; k += 3) {
		uint32_t v = (uint32_t)raw[k] << 16 | (k + 1 < n ? (uint32_t)raw[k + 1] << 8 : 0) |
			     (k + 2 < n ? raw[k + 2] : 0);

		put8(h, (uint8_t)digit[v >> 18]);
		put8(h, (uint8_t)digit[v >> 12 & 63]);
		put8(h, (uint8_t)(k + 1 < n ? digit[v >> 6 & 63] : '='));
		put8(h, (uint8_t)(k + 2 < n ? digit[v & 63] : '='));
	}
}

static void ask_http(struct proxy_handshake *h)
{
	const struct proxy_target *t = &h->target;
	char host[INET6_ADDRSTRLEN], authority[256 + 8];

	if (t->name[0]) {
		snprintf(authority, sizeof(authority), "%.253s:%u", t->name, t->port);
	} else if (!memcmp(t->addr, mapped, 12)) {
		inet_ntop(AF_INET, t->addr + 12, host, sizeof(host));
		snprintf(authority, sizeof(authority), "%s:%u", host, t->port);
	} else {
		inet_ntop(AF_INET6, t->addr, host, sizeof(host));
		snprintf(authority, sizeof(authority), "[%s]:%u", host, t->port);
	}
	put_text(h, "CONNECT ");
	put_text(h, authority);
	put_text(h, " HTTP/1.1\r\nHost: "); /* RFC 9112 3.2.3, 3.2 */
	put_text(h, authority);
	if (h->server->user_len) {
		put_text(h, "\r\nProxy-Authorization: Basic ");
		put_basic(h);
	}
	put_text(h, "\r\n\r\n");
	h->state = HS_HTTP;
}

static int http_error(uint16_t status)
{
	switch (status) {
	case 401:
	case 403:
	case 405:
	case 407:
	case 451:
		return -EACCES;
	case 502:
	case 503:
		return -EHOSTUNREACH;
	case 408:
	case 504:
		return -ETIMEDOUT;
	}
	return -ECONNREFUSED;
}

/* The status out of the first bytes of the line (RFC 9112 4): 0 or -EPROTO. */
static int parse_status(struct proxy_handshake *h)
{
	const uint8_t *l = h->in;

	if (h->line < 12 || l[5] != '1' || l[6] != '.' || l[7] < '0' || l[7] > '9' || l[8] != ' ' || l[9] < '1' ||
	    l[9] > '9' || l[10] < '0' || l[10] > '9' || l[11] < '0' || l[11] > '9' || (h->line > 12 && l[12] != ' '))
		return -EPROTO;
	h->status = (uint16_t)((l[9] - '0') * 100 + (l[10] - '0') * 10 + (l[11] - '0'));
	return 0;
}

/* One byte of the answer: 1 more to come, 0 that was the last, -EPROTO. */
static int http_byte(struct proxy_handshake *h, uint8_t c)
{
	static const char head[] = "HTTP/";

	if ((h->skip_line || h->status) && ++h->headers > HTTP_HEADERS_MAX)
		return -EPROTO;
	if (c == '\r')
		return h->skip_line || h->line ? 1 : -EPROTO;
	if (c != '\n') {
		if (!h->skip_line) {
			if (h->line < 5 && c != head[h->line])
				return -EPROTO; /* at once: it may never send a line's end */
			if (h->line >= HTTP_STATUS_MAX)
				return -EPROTO;
			if (h->line < HTTP_STATUS_TEXT)
				h->in[h->line] = c;
		}
		h->line++;
		return 1;
	}
	if (!h->skip_line) {
		int r = parse_status(h);

		if (r)
			return r;
		h->skip_line = 1;
	} else if (!h->line) {
		if (h->status >= 200)
			return 0;
		h->skip_line = 0; /* an interim answer (RFC 9110 15.2): the real one follows */
	}
	h->line = 0;
	return 1;
}

static int read_http(struct proxy_handshake *h, int fd)
{
	for (;;) {
		uint8_t piece[HTTP_PIECE];
		ssize_t n = recv(fd, piece, sizeof(piece), MSG_PEEK | MSG_DONTWAIT);
		size_t take = 0;
		int r = 1;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 1 : -errno;
		if (!n)
			return -ECONNRESET;
		while (r > 0 && take < (size_t)n)
			r = http_byte(h, piece[take++]);
		if (r < 0)
			return r;
		/* The bytes are there, so they come at once and whole. */
		if (recv(fd, piece, take, MSG_DONTWAIT) != (ssize_t)take)
			return -EPROTO;
		if (r == 0) {
			if (h->status < 300) /* any 2xx (RFC 9110 9.3.6); a length in its headers means nothing */
				return 0;
			h->said_no = 1;
			return http_error(h->status);
		}
	}
}

/* --- SOCKS5 --- */

static void expect(struct proxy_handshake *h, enum hs_state state, uint32_t bytes)
{
	h->state = state;
	h->have = 0;
	h->want = bytes;
}

static void ask_method(struct proxy_handshake *h)
{
	put8(h, SOCKS_VERSION);
	put8(h, h->server->user_len ? 2 : 1);
	put8(h, SOCKS_METHOD_NONE);
	if (h->server->user_len)
		put8(h, SOCKS_METHOD_PASSWORD);
	expect(h, HS_METHOD, 2);
}

static void ask_socks(struct proxy_handshake *h)
{
	static const uint8_t nowhere[16] = { 0 };
	const struct proxy_target *t = &h->target;
	uint16_t port = htons(t->port);

	put8(h, SOCKS_VERSION);
	put8(h, h->associate ? SOCKS_ASSOCIATE : SOCKS_CONNECT);
	put8(h, 0);
	if (h->associate) {
		/* RFC 1928 4: zeros from a client that does not know yet where it will send from. */
		put8(h, SOCKS_IPV4);
		put(h, nowhere, 4);
		port = 0;
	} else if (t->name[0]) {
		size_t n = strnlen(t->name, sizeof(t->name));

		put8(h, SOCKS_NAME);
		put8(h, (uint8_t)n);
		put(h, t->name, n);
	} else if (!memcmp(t->addr, mapped, 12)) {
		put8(h, SOCKS_IPV4);
		put(h, t->addr + 12, 4);
	} else {
		put8(h, SOCKS_IPV6);
		put(h, t->addr, 16);
	}
	put(h, &port, 2);
	expect(h, HS_REPLY, 5); /* the fifth byte is the length if the address is a name */
}

/* RFC 1928 6 */
static int socks_error(uint8_t reply)
{
	switch (reply) {
	case 2: /* not allowed by ruleset */
		return -EACCES;
	case 3:
	case 8: /* address type not supported */
		return -ENETUNREACH;
	case 4:
	case 6: /* TTL expired */
		return -EHOSTUNREACH;
	}
	return -ECONNREFUSED; /* 1 general failure, 5 refused, 7 command not supported */
}

/* in[] holds what was wanted: 1 there is more to say or to read, 0 the proxy said yes, -errno. */
static int socks_answer(struct proxy_handshake *h)
{
	const struct proxy_server *s = h->server;
	const uint8_t *in = h->in;
	uint32_t whole;

	switch (h->state) {
	case HS_METHOD:
		if (in[0] != SOCKS_VERSION)
			return -EPROTO;
		if (in[1] == SOCKS_METHOD_NONE) {
			ask_socks(h);
			return 1;
		}
		if (in[1] != SOCKS_METHOD_PASSWORD || !s->user_len) {
			h->said_no = in[1] == 0xff;
			return h->said_no ? -EACCES : -EPROTO;
		}
		put8(h, SOCKS_AUTH_VERSION);
		put8(h, s->user_len);
		put(h, s->user, s->user_len);
		put8(h, s->password_len);
		put(h, s->password, s->password_len);
		expect(h, HS_AUTH, 2);
		return 1;
	case HS_AUTH:
		if (in[0] != SOCKS_AUTH_VERSION && in[0] != SOCKS_VERSION) /* some servers answer with 5 */
			return -EPROTO;
		if (in[1]) {
			h->said_no = 1;
			return -EACCES;
		}
		ask_socks(h);
		return 1;
	}
	if (in[0] != SOCKS_VERSION)
		return -EPROTO;
	if (in[1]) {
		h->said_no = 1;
		return socks_error(in[1]);
	}
	if (in[3] == SOCKS_IPV4)
		whole = 4 + 4 + 2;
	else if (in[3] == SOCKS_IPV6)
		whole = 4 + 16 + 2;
	else if (in[3] == SOCKS_NAME)
		whole = 4 + 1 + in[4] + 2;
	else
		return -EPROTO;
	if (h->have < whole) {
		h->want = whole;
		return 1;
	}
	return 0;
}

static int read_socks(struct proxy_handshake *h, int fd)
{
	while (h->have < h->want) {
		ssize_t n = recv(fd, h->in + h->have, h->want - h->have, MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 1 : -errno;
		if (!n) {
			/* Servers that say no often cut the rest of the reply. */
			if (h->state == HS_REPLY && h->have >= 2 && h->in[0] == SOCKS_VERSION && h->in[1]) {
				h->said_no = 1;
				return socks_error(h->in[1]);
			}
			return -ECONNRESET;
		}
		h->have += (uint32_t)n;
	}
	return 2;
}

/* --- both --- */

struct proxy_handshake *proxy_handshake_new(const struct proxy_server *server, int associate,
					    const struct proxy_target *target)
{
	struct proxy_handshake *h = calloc(1, sizeof(*h));

	if (!h)
		return NULL;
	h->server = server;
	h->target = *target;
	h->target.name[sizeof(h->target.name) - 1] = 0;
	h->associate = associate != 0;
	if (server->kind == PROXY_HTTP)
		ask_http(h);
	else
		ask_method(h);
	return h;
}

struct proxy_handshake *proxy_handshake_again(const struct proxy_server *server, const struct proxy_handshake *was)
{
	struct proxy_handshake *h;

	if (was->state > HS_REPLY || was->nout > sizeof(was->out) || was->sent > was->nout || was->want > sizeof(was->in) ||
	    was->have > was->want)
		return NULL;
	h = malloc(sizeof(*h));
	if (!h)
		return NULL;
	*h = *was;
	h->server = server;
	return h;
}

void proxy_handshake_free(struct proxy_handshake *h)
{
	if (!h)
		return;
	explicit_bzero(h->out, sizeof(h->out)); /* it held the password */
	free(h);
}

int proxy_handshake_step(struct proxy_handshake *h, int fd)
{
	for (;;) {
		int r;

		while (h->sent < h->nout) {
			ssize_t n = send(fd, h->out + h->sent, h->nout - h->sent, MSG_DONTWAIT | MSG_NOSIGNAL);

			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0)
				return errno == EAGAIN ? 1 : errno == EPIPE ? -ECONNRESET : -errno;
			h->sent += (uint32_t)n;
		}
		h->sent = h->nout = 0;
		if (h->state == HS_HTTP)
			return read_http(h, fd);
		r = read_socks(h, fd);
		if (r != 2)
			return r;
		r = socks_answer(h);
		if (r <= 0)
			return r;
	}
}

int proxy_handshake_said_no(const struct proxy_handshake *h)
{
	return h->said_no;
}

int proxy_handshake_bound(const struct proxy_handshake *h, uint8_t addr[16], uint16_t *port)
{
	const uint8_t *in = h->in;

	if (in[3] == SOCKS_IPV4) {
		memcpy(addr, mapped, 12);
		memcpy(addr + 12, in + 4, 4);
		*port = (uint16_t)(in[8] << 8 | in[9]);
	} else if (in[3] == SOCKS_IPV6) {
		memcpy(addr, in + 4, 16);
		*port = (uint16_t)(in[20] << 8 | in[21]);
	} else {
		return -EAFNOSUPPORT;
	}
	return 0;
}
