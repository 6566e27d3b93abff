/* proxy_handshake.h - asking a proxy for a connection, on a socket that is connected to it.
 *
 * Knows no flow and no guest: proxy.c does. How it works stands in proxy_handshake.c.
 */
#ifndef RN_PROXY_HANDSHAKE_H
#define RN_PROXY_HANDSHAKE_H

#include <stdint.h>

/* CFFI BEGIN */
enum proxy_kind { PROXY_HTTP = 1, PROXY_SOCKS5 };

struct proxy_server {
	uint8_t kind;		       /* enum proxy_kind */
	uint8_t user_len, password_len; /* 0 user_len: no credentials */
	uint8_t addr[16];	       /* IPv4: mapped */
	uint16_t port;		       /* host order */
	uint16_t only_port;	       /* flows to this port only; 0: to any */
	char user[255], password[255]; /* no NUL behind them (RFC 1929 2: 1..255 bytes) */
};
struct proxy_target {
	uint8_t addr[16];
	uint16_t port;	/* host order */
	char name[254]; /* not "": asked for by this name, and the proxy finds the address */
};
struct proxy_handshake; /* opaque to Python */

/* @server must outlive it. @associate: SOCKS5 UDP ASSOCIATE instead of CONNECT. NULL if out of memory. */
struct proxy_handshake *proxy_handshake_new(const struct proxy_server *server, int associate,
					    const struct proxy_target *target);
void proxy_handshake_free(struct proxy_handshake *h);
/* Go on as far as the non-blocking socket lets us: 1 not done, call again when it is readable or writable; 0 the proxy
 * said yes, and what can be read next is the tunnel's; else -errno: what a connect() without a proxy would have said as
 * far as the proxy told, -EACCES if it did not let us, -EPROTO if it does not speak the protocol, -ECONNRESET if it
 * hung up. */
int proxy_handshake_step(struct proxy_handshake *h, int fd);
/* 1: the proxy itself answered what the last step returned (it said no), 0: it failed. */
int proxy_handshake_said_no(const struct proxy_handshake *h);
/* After success: the address it bound, for ASSOCIATE where to send datagrams. -EAFNOSUPPORT: it gave a name. */
int proxy_handshake_bound(const struct proxy_handshake *h, uint8_t addr[16], uint16_t *port);
/* CFFI END */

#define PROXY_OUT_MAX 1536u /* CONNECT with a name of 253 bytes and 511 bytes of credentials: 1275 */
#define PROXY_REPLY_MAX 262u /* RFC 1928 6 with a name of 255 bytes */

enum hs_state { HS_HTTP, HS_METHOD, HS_AUTH, HS_REPLY };

struct proxy_handshake {
	const struct proxy_server *server;
	struct proxy_target target;
	uint8_t associate, state, said_no;
	uint8_t skip_line; /* HTTP: the status line is done, these are headers */
	uint16_t status;
	uint32_t line;	  /* HTTP: bytes of the current line without its end */
	uint32_t headers; /* bytes of all header lines so far */
	uint32_t have, want; /* bytes of in[] */
	uint32_t sent, nout;
	uint8_t in[PROXY_REPLY_MAX];
	uint8_t out[PROXY_OUT_MAX];
};

/* Go on where @was, a copy of another process's, stopped. NULL: it cannot be one, or out of memory. */
struct proxy_handshake *proxy_handshake_again(const struct proxy_server *server, const struct proxy_handshake *was);

#endif
