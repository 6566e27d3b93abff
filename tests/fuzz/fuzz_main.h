/* fuzz_main.h - what a fuzz target gives its driver, and the other way round.
 *
 * A target defines LLVMFuzzerTestOneInput() and the two functions below. Under clang -fsanitize=fuzzer -DLIBFUZZER libFuzzer
 * is the driver, which has fuzz_generate() called now and then; otherwise fuzz_main.c is.
 */
#ifndef FUZZ_MAIN_H
#define FUZZ_MAIN_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Make an input of at most @cap bytes out of the stream of random numbers fuzz_rnd(); returns its length. */
size_t fuzz_generate(uint8_t *buf, size_t cap);

/* Print what was reached, as lines "name number": the test of the fuzzer looks at it. */
void fuzz_report(void);

/* A random number below @below; part of the run's stream, so that a run is repeatable. */
uint32_t fuzz_rnd(uint32_t below);

#endif
