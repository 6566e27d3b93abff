/* rn_pcap.c - capture of the guest's link: what the guest sent and what it was sent, in one pcapng file.
 *
 * The supervisor creates the file and writes its head; guest_tx and guest_rx each append. Both hold an
 * O_APPEND descriptor of one inode and write whole blocks, a batch with one write() a turn. The kernel
 * takes the inode's lock for the whole of an appending write to a regular file (ext4, xfs, btrfs, tmpfs),
 * so the two never interleave inside a block. NFS does not promise this, nor does a pipe for more than
 * PIPE_BUF bytes. Blocks of the two writers may be a few milliseconds out of time order; readers sort.
 *
 * Frames are captured as they are on the link: with virtio-net offloads that means super-frames longer
 * than the MTU, and TCP and UDP checksums that are still partial (pseudo-header only), as tcpdump shows
 * them on any interface with offloads. The virtio-net header itself is not in the file.
 *
 * An error ends this writer's part: the batch and all later frames count as lost, the network goes on.
 */
#include "rn_pcap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "rn_pcapng.h"

#define PCAP_BATCH 262144u /* bytes: three super-frames and more; flushed early when full */

/* Fixed parts of an enhanced packet block, in front of and behind the padded frame. */
#define EPB_HEAD 28u
#define EPB_TAIL 16u /* epb_flags, end of options, block length again */

struct rn_pcap {
	int fd;
	int dir;	  /* enum rn_pcap_dir */
	int dead;	  /* 1: a write failed, nothing more is written */
	uint32_t snaplen; /* 0: whole frames */
	uint32_t used;	  /* bytes of whole blocks in buf */
	uint32_t batch;	  /* frames in buf */
	uint64_t written, lost;
	uint8_t *buf; /* PCAP_BATCH bytes */
};

static int write_all(int fd, const uint8_t *p, size_t n)
{
	while (n) {
		ssize_t w = write(fd, p, n);

		if (w < 0 && errno == EINTR)
			continue;
		if (w <= 0)
			return w < 0 ? -errno : -EIO;
		p += w;
		n -= (size_t)w;
	}
	return 0;
}

int rn_pcap_begin(int fd, const char *ifname, uint32_t snaplen)
{
	static const char app[] = "ringnet";
	static const uint8_t nanoseconds = 9; /* 10^-9 s */
	size_t name_len = strnlen(ifname, 64);
	uint8_t head[256], *p = head, *start = head;

	p = pcapng_put32(p, PCAPNG_SHB);
	p = pcapng_put32(p, 0);
	p = pcapng_put32(p, PCAPNG_BYTE_ORDER);
	p = pcapng_put16(p, 1);
	p = pcapng_put16(p, 0);
	p = pcapng_put32(p, UINT32_MAX); /* section length, 64 bits: not known */
	p = pcapng_put32(p, UINT32_MAX);
	p = pcapng_option(p, PCAPNG_SHB_USERAPPL, app, sizeof(app) - 1);
	p = pcapng_option(p, PCAPNG_OPT_END, NULL, 0);
	p = pcapng_end(start, p);

	start = p;
	p = pcapng_put32(p, PCAPNG_IDB);
	p = pcapng_put32(p, 0);
	p = pcapng_put16(p, PCAPNG_LINKTYPE_ETHERNET);
	p = pcapng_put16(p, 0);
	p = pcapng_put32(p, snaplen);
	p = pcapng_option(p, PCAPNG_IF_NAME, ifname, (uint16_t)name_len);
	p = pcapng_option(p, PCAPNG_IF_TSRESOL, &nanoseconds, 1);
	p = pcapng_option(p, PCAPNG_OPT_END, NULL, 0);
	p = pcapng_end(start, p);
	return write_all(fd, head, (size_t)(p - head));
}

struct rn_pcap *rn_pcap_new(int fd, int dir, uint32_t snaplen)
{
	struct rn_pcap *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->buf = malloc(PCAP_BATCH);
	if (!p->buf) {
		free(p);
		return NULL;
	}
	p->fd = fd;
	p->dir = dir;
	p->snaplen = snaplen;
	return p;
}

void rn_pcap_free(struct rn_pcap *p)
{
	if (!p)
		return;
	rn_pcap_flush(p);
	free(p->buf);
	free(p);
}

/* A full disk took part of a batch. Cut the torn block off again, unless the other writer has appended
 * meanwhile: then it lies in the middle and a reader stops there. */
static void cut_torn(int fd, ssize_t torn)
{
	off_t end = lseek(fd, 0, SEEK_CUR); /* an O_APPEND write leaves the offset behind its own bytes */
	struct stat st;

	if (end >= torn && !fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size == end && ftruncate(fd, end - torn))
		return; /* nothing more to be done; the batch is counted as lost either way */
}

void rn_pcap_flush(struct rn_pcap *p)
{
	ssize_t n;

	if (!p->used)
		return;
	do
		n = write(p->fd, p->buf, p->used);
	while (n < 0 && errno == EINTR);
	if (n == (ssize_t)p->used) {
		p->written += p->batch;
	} else {
		p->lost += p->batch;
		p->dead = 1;
		if (n > 0)
			cut_torn(p->fd, n);
	}
	p->used = 0;
	p->batch = 0;
}

void rn_pcap_frame(struct rn_pcap *p, const uint8_t *eth, uint32_t len)
{
	uint32_t cap = p->snaplen && len > p->snaplen ? p->snaplen : len;
	uint32_t flags = (uint32_t)p->dir;
	uint64_t need = (uint64_t)EPB_HEAD + pcapng_pad4(cap) + EPB_TAIL;
	struct timespec ts;
	uint8_t *start, *b;
	uint64_t ns;

	if (!p->dead && need > PCAP_BATCH - p->used)
		rn_pcap_flush(p);
	if (p->dead || need > PCAP_BATCH) {
		p->lost++;
		return;
	}
	/* pcapng counts from 1970 UTC (4.3), so not the loop's monotonic clock. */
	clock_gettime(CLOCK_REALTIME, &ts);
	ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	start = b = p->buf + p->used;
	b = pcapng_put32(b, PCAPNG_EPB);
	b = pcapng_put32(b, 0);
	b = pcapng_put32(b, 0); /* interface: the only one */
	b = pcapng_put32(b, (uint32_t)(ns >> 32));
	b = pcapng_put32(b, (uint32_t)ns);
	b = pcapng_put32(b, cap);
	b = pcapng_put32(b, len);
	memcpy(b, eth, cap);
	memset(b + cap, 0, pcapng_pad4(cap) - cap);
	b += pcapng_pad4(cap);
	b = pcapng_option(b, PCAPNG_EPB_FLAGS, &flags, sizeof(flags));
	b = pcapng_option(b, PCAPNG_OPT_END, NULL, 0);
	b = pcapng_end(start, b);
	p->used += (uint32_t)(b - start);
	p->batch++;
}

uint64_t rn_pcap_written(const struct rn_pcap *p)
{
	return p->written;
}

uint64_t rn_pcap_lost(const struct rn_pcap *p)
{
	return p->lost;
}
