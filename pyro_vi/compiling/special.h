/* What C functions call that emit.py writes. */
#define __FAST_MATH__ 1 /* then glibc declares vector forms of exp and others */
#include <math.h>
#undef __FAST_MATH__

/* The function that emit.py writes, of parts that return a nonzero number to end it. */
#define PART_ARGUMENTS char **in, char *work, long step, long (*call)(long, long)
#define RUN_ARGUMENTS \
  char **start, const long *stride, char *work, long count, long (*call)(long, long)
#define RUN(outer, ...) \
  long run(RUN_ARGUMENTS) { \
    part *parts[] = {__VA_ARGS__}; \
    return run_parts(parts, sizeof parts / sizeof *parts, outer, start, stride, work, count, call); \
  }
typedef long part(PART_ARGUMENTS);

static long run_parts(part *const *parts, long n, long outer, RUN_ARGUMENTS) {
  char *in[outer + 1];
  for (long step = 0; step < count; step++) {
    for (long i = 0; i < outer; i++) in[i] = start[i] + step * stride[i];
    for (long i = 0; i < n; i++)
      if (parts[i](in, work, step, call)) return step;
  }
  return count;
}

/* An index within bounds. */
static inline long within(long i, long n) {
  i = i < 0 ? i + n : i;
  return i < 0 ? 0 : i >= n ? n - 1 : i;
}

static double digamma(double x) {
  if (x == 0) return copysign(INFINITY, -x);
  if (x > 1e20) return log(x);
  if (x < 0) {
    double whole, rest = modf(x, &whole);
    return rest == 0 ? NAN : digamma(1 - x) - M_PI / tan(M_PI * rest);
  }
  /* The sum of 1 / (x + i) for i < 10, of which two make one fraction, and the series at x + 10. */
  double t = x * (x + 9), y = x + 10, z = 1 / (y * y);
  double sum = (2 * t + 8) / (t * (t + 8)) + (2 * t + 32) / ((t + 14) * (t + 18)) + 1 / (t + 20);
  return log(y) - 0.5 / y - (2 * x + 9) * sum
    - z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132
    - z * (691.0 / 32760 - z / 12))))));
}

static double trigamma(double x) {
  if (x < 0.5) {
    double s = sin(M_PI * x);
    return M_PI * M_PI / (s * s) - trigamma(1 - x);
  }
  double sum = 0;
  for (int i = 0; i < 6; i++, x += 1) sum += 1 / (x * x);
  double z = 1 / (x * x);
  return sum + (1 + 1 / (2 * x) + z * (1.0 / 6 - z * (1.0 / 30 - z / 42))) / x;
}

/* As % and // of Python. */
static double remainder_of(double x, double y) {
  double found = fmod(x, y);
  return found != 0 && (y < 0) != (found < 0) ? found + y : found;
}

static double floor_of(double x, double y) {
  if (y == 0) return x / y;
  double rest = fmod(x, y), found = (x - rest) / y, whole = floor(found);
  if (rest != 0 && (y < 0) != (rest < 0)) found -= 1, whole = floor(found);
  return found == 0 ? 0 : found - whole > 0.5 ? whole + 1 : whole;
}

/* The first place k of n at which no other element is better; NaN is better than all. */
#define FIRST(n, element, better) ({ \
    long k = 0, place = 0; \
    __typeof__(element) best = element; \
    for (k = 1; k < n; k++) { \
      const __typeof__(element) x = element; \
      if (x better best || (x != x && best == best)) best = x, place = k; \
    } \
    place; \
  })
