// Chooses the table of kernels for this processor, once.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace pycdgkd {
namespace baseline {
extern const Kernels table;
}
#if defined(PYCDGKD_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace cpu {
namespace {

struct Candidate {
  const Kernels* table;
  bool runs;
};

const Kernels& choose() {
#if defined(PYCDGKD_X86)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&baseline::table, true}};
#else
  const Candidate candidates[] = {{&baseline::table, true}};
#endif
  const char* forced = std::getenv("PYCDGKD_ISA");
  for (const Candidate& candidate : candidates) {
    const bool wanted =
        forced == nullptr || *forced == '\0' || std::strcmp(forced, candidate.table->isa) == 0;
    if (wanted && candidate.runs) return *candidate.table;
  }
  throw std::runtime_error(std::string("pycdgkd: PYCDGKD_ISA=") + forced +
                           " cannot run here; compiled: " + compiled_isas() +
                           "; unset the variable to use the best one");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* compiled_isas() {
#if defined(PYCDGKD_X86)
  return "baseline,avx2,avx512";
#else
  return "baseline";
#endif
}

}  // namespace cpu
}  // namespace pycdgkd
