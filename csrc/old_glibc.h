// Included before every C++ file of the extension (setup.py), so that a build on a newer glibc still loads with 2.28,
// as torch's own wheels do. `make wheels` fails where a symbol of a later one is left.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
// exp of 2.29 differs only in what it does with errno.
__asm__(".symver exp,exp@GLIBC_2.2.5");
#endif

#if defined(__GLIBC__)
// Of 2.32; libstdc++ reads it before it counts references. "There may be other threads" is always a safe answer.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
