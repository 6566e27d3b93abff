/* fuzz_main.c - the driver for fuzz targets: seeded, bounded, repeatable, without coverage. Built with -DLIBFUZZER it only
 * gives libFuzzer, which then drives, the targets' own generators to mutate with (at the end of this file).
 *
 *   fuzz_X [-seed S] [-runs N] [-seconds T] [-first I] [-keep DIR] [SEEDFILE...]
 *
 * First every SEEDFILE as it is; then runs I, I+1, ... until N were done or T seconds are over. Run I of seed S is made
 * of a stream of random numbers that (S, I) alone determines: by the target's own fuzz_generate(), or by mutating one of
 * the seed files. When the target dies (a sanitizer's report, abort()), seed and run are printed and the input is kept
 * in DIR (default: the working directory) as crash-S-I. Without -runs and -seconds only the files run: a replay.
 */
#include "fuzz_main.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAVE_ASAN 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define HAVE_ASAN 1
#endif
#ifdef HAVE_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#define INPUT_CAP 65536u

#ifndef LIBFUZZER
#define FILES_CAP 4096u

static struct {
	uint8_t input[INPUT_CAP];
	size_t len;
	uint64_t seed, run;
	const char *file; /* not NULL: the input is this file, nothing to keep */
	const char *keep;
	int dead;
	uint64_t state;
} driver;

struct file {
	const char *name;
	uint8_t *data;
	size_t len;
};

static uint64_t *random_state(void)
{
	return &driver.state;
}

/* The target is dying: say which input it was, and keep it. Only calls that are allowed in a signal handler. */
static void last_words(void)
{
	char text[512];
	int fd, n;

	if (driver.dead)
		return;
	driver.dead = 1;
	if (driver.file) {
		n = snprintf(text, sizeof(text), "\nfuzz: died of %s\n", driver.file);
	} else {
		char path[400];

		snprintf(path, sizeof(path), "%s/crash-%llu-%llu", driver.keep, (unsigned long long)driver.seed,
			 (unsigned long long)driver.run);
		fd = open(path, O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0644);
		if (fd >= 0) {
			if (write(fd, driver.input, driver.len) != (ssize_t)driver.len)
				path[0] = 0;
			close(fd);
		}
		n = snprintf(text, sizeof(text), "\nfuzz: died in run %llu of seed %llu (again: -seed %llu -first %llu -runs 1); input: %s\n",
			     (unsigned long long)driver.run, (unsigned long long)driver.seed, (unsigned long long)driver.seed,
			     (unsigned long long)driver.run, path);
	}
	if (write(2, text, (size_t)n) < 0)
		return;
}

#ifdef HAVE_ASAN
/* gcc links two runtimes, and only AddressSanitizer's knows the callback: UBSan's comes by SIGABRT. */
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void)
{
	return "abort_on_error=1:print_stacktrace=1";
}
#endif

static void on_signal(int sig)
{
	last_words();
	signal(sig, SIG_DFL);
	raise(sig);
}

static size_t mutate(uint8_t *buf, size_t len)
{
	for (uint32_t times = 1 + fuzz_rnd(6); times; times--) {
		size_t at = len ? fuzz_rnd((uint32_t)len) : 0;

		switch (fuzz_rnd(6)) {
		case 0:
			if (len)
				buf[at] ^= (uint8_t)(1u << fuzz_rnd(8));
			break;
		case 1:
			if (len)
				buf[at] = (uint8_t)fuzz_rnd(256);
			break;
		case 2:
			len = len ? at : 0;
			break;
		case 3: { /* a part twice */
			size_t n = len ? fuzz_rnd((uint32_t)(len - at)) : 0;

			if (len + n <= INPUT_CAP) {
				memmove(buf + at + n, buf + at, len - at);
				len += n;
			}
			break;
		}
		case 4: { /* a part less */
			size_t n = len ? fuzz_rnd((uint32_t)(len - at)) : 0;

			memmove(buf + at, buf + at + n, len - at - n);
			len -= n;
			break;
		}
		default: { /* what a generator would put here */
			size_t n = fuzz_generate(buf + at, INPUT_CAP - at > 64 ? 64 : INPUT_CAP - at);

			if (at + n > len)
				len = at + n;
		}
		}
	}
	return len;
}

static int load(struct file *f, const char *name)
{
	FILE *in = fopen(name, "rb");

	if (!in) {
		fprintf(stderr, "fuzz: %s: %s\n", name, strerror(errno));
		return -1;
	}
	f->name = name;
	f->data = malloc(INPUT_CAP);
	f->len = f->data ? fread(f->data, 1, INPUT_CAP, in) : 0;
	fclose(in);
	return f->data ? 0 : -1;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static struct file files[FILES_CAP];
	unsigned long long runs = 0, first = 0, done = 0;
	double seconds = 0, end;
	uint32_t n = 0;
	int k;

	driver.keep = ".";
	for (k = 1; k < argc; k++) {
		const char *value = k + 1 < argc ? argv[k + 1] : NULL;

		if (argv[k][0] != '-') {
			if (n == FILES_CAP || load(&files[n++], argv[k]))
				return 2;
			continue;
		}
		if (!value) {
			fprintf(stderr, "fuzz: %s needs a value\n", argv[k]);
			return 2;
		}
		if (!strcmp(argv[k], "-seed"))
			driver.seed = strtoull(value, NULL, 10);
		else if (!strcmp(argv[k], "-runs"))
			runs = strtoull(value, NULL, 10);
		else if (!strcmp(argv[k], "-seconds"))
			seconds = strtod(value, NULL);
		else if (!strcmp(argv[k], "-first"))
			first = strtoull(value, NULL, 10);
		else if (!strcmp(argv[k], "-keep"))
			driver.keep = value;
		else {
			fprintf(stderr, "fuzz: no option %s\n", argv[k]);
			return 2;
		}
		k++;
	}
	signal(SIGABRT, on_signal);
#ifdef HAVE_ASAN
	__sanitizer_set_death_callback(last_words);
#else
	signal(SIGSEGV, on_signal);
	signal(SIGBUS, on_signal);
#endif
	for (uint32_t i = 0; i < n; i++) {
		driver.file = files[i].name;
		LLVMFuzzerTestOneInput(files[i].data, files[i].len);
	}
	driver.file = NULL;
	end = now() + seconds;
	for (driver.run = first; (runs && done < runs) || (seconds > 0 && now() < end); driver.run++, done++) {
		driver.state = driver.seed * 0x2545f4914f6cdd1dull + driver.run * 0xd1342543de82ef95ull;
		if (n && fuzz_rnd(4) == 0) {
			const struct file *f = &files[fuzz_rnd(n)];

			memcpy(driver.input, f->data, f->len);
			driver.len = mutate(driver.input, f->len);
		} else {
			driver.len = fuzz_generate(driver.input, INPUT_CAP);
		}
		LLVMFuzzerTestOneInput(driver.input, driver.len);
	}
	printf("runs %llu\n", done);
	fuzz_report();
	for (uint32_t i = 0; i < n; i++)
		free(files[i].data);
	return 0;
}

#else /* LIBFUZZER */

static uint64_t mutator_state;

static uint64_t *random_state(void)
{
	return &mutator_state;
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned int seed);

/* Mostly what libFuzzer does itself; one in eight times a stretch of what the target's generator makes goes somewhere into
 * the input, as bytes that mean something to the target are seldom hit upon. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned int seed)
{
	static uint8_t made[INPUT_CAP];
	size_t at, n;

	mutator_state = seed;
	if (fuzz_rnd(8) || !max)
		return LLVMFuzzerMutate(data, size, max);
	n = fuzz_generate(made, sizeof(made));
	if (n > 512)
		n = 16 + fuzz_rnd(496);
	at = size ? fuzz_rnd((uint32_t)size + 1) : 0;
	if (n > max - at)
		n = max - at;
	memcpy(data + at, made, n);
	return at + n > size ? at + n : size;
}

#endif

uint32_t fuzz_rnd(uint32_t below) /* splitmix64 */
{
	uint64_t z = *random_state() += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	z ^= z >> 31;
	return below ? (uint32_t)((z >> 32) % below) : 0;
}
