/* Triangular matrices; emit.py replaces REAL by a type. A matrix is an address and the steps from a
   row and from a column to the next, which are constants once the functions are inlined. */
#define INLINE static inline __attribute__((always_inline))

/* The lower factor l of a matrix a; each column from those before it. It returns 0, or the order of
   the first leading minor that is not positive. */
INLINE long cholesky_REAL(REAL *restrict l, long lr, long lc, const REAL *restrict a, long ar,
                          long ac, long n) {
  long wrong = 0;
  for (long c = 0; c < n; c++) {
    for (long r = 0; r < n; r++) l[r * lr + c * lc] = r < c ? 0 : a[r * ar + c * ac];
    for (long k = 0; k < c; k++) {
      const REAL w = l[c * lr + k * lc];
#pragma omp simd
      for (long r = c; r < n; r++) l[r * lr + c * lc] -= w * l[r * lr + k * lc];
    }
    const REAL pivot = l[c * lr + c * lc];
    if (!(pivot > 0) && !wrong) wrong = c + 1;
    l[c * lr + c * lc] = sqrt(pivot);
    for (long r = c + 1; r < n; r++) l[r * lr + c * lc] /= l[c * lr + c * lc];
  }
  return wrong;
}

/* The solution x, with m columns, of a x = b for a triangular matrix a; each row from those that
   are known. */
INLINE void solve_REAL(REAL *restrict x, long xr, long xc, const REAL *restrict a, long ar, long ac,
                       const REAL *restrict b, long br, long bc, long n, long m, int upper,
                       int unit) {
  for (long i = 0; i < n; i++) {
    const long r = upper ? n - 1 - i : i, first = upper ? r + 1 : 0;
    const REAL pivot = unit ? 1 : a[r * ar + r * ac];
    if (m == 1) {
      REAL sum = 0;
#pragma omp simd reduction(+ : sum)
      for (long k = 0; k < i; k++) sum += a[r * ar + (first + k) * ac] * x[(first + k) * xr];
      x[r * xr] = (b[r * br] - sum) / pivot;
      continue;
    }
    for (long c = 0; c < m; c++) x[r * xr + c * xc] = b[r * br + c * bc];
    for (long k = first; k < first + i; k++) {
      const REAL w = a[r * ar + k * ac];
#pragma omp simd
      for (long c = 0; c < m; c++) x[r * xr + c * xc] -= w * x[k * xr + c * xc];
    }
    for (long c = 0; c < m; c++) x[r * xr + c * xc] /= pivot;
  }
}
