// The kernels that csrc/cuda/rowloss.cu launches, without PyTorch: what nvcc makes of them is checked for every
// architecture by tests/test_rowloss_cuda.py. With -DDUAL those with the solver, which take long to compile, for one
// type of logits (-DLOGIT=float -DREAL=float and so on); else the others, for all types.
#include "rowloss.cuh"

namespace armor::cuda {

#ifdef DUAL
template __global__ void rowloss_dual<LOGIT, REAL, WarpGroup>(Rowlosses<LOGIT, REAL>, Rows<REAL>, Workspace);
template __global__ void rowloss_dual<LOGIT, REAL, BlockGroup>(Rowlosses<LOGIT, REAL>, Rows<REAL>, Workspace);
template __global__ void rowloss_dual<LOGIT, REAL, GridGroup>(Rowlosses<LOGIT, REAL>, Rows<REAL>, Workspace);
#else
#define INSTANTIATE(L, T)                                  \
  template __global__ void rowloss<L, T>(Rowlosses<L, T>); \
  template __global__ void rowloss_backward<L, T>(RowlossGradients<L, T>);
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
INSTANTIATE(float, float)
INSTANTIATE(double, double)
#endif

}  // namespace armor::cuda
