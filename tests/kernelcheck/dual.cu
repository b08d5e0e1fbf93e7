// The kernels that csrc/cuda/dual.cu launches for one dtype (-DREAL=float or double), without PyTorch: what nvcc makes
// of them is checked for every architecture by tests/test_dual_cuda.py.
#include "dual.cuh"

namespace armor::cuda {

template __global__ void dual<REAL, WarpGroup>(Rows<REAL>, Workspace);
template __global__ void dual<REAL, BlockGroup>(Rows<REAL>, Workspace);
template __global__ void dual<REAL, GridGroup>(Rows<REAL>, Workspace);
template __global__ void dual_backward<REAL>(Gradients<REAL>);

}  // namespace armor::cuda
