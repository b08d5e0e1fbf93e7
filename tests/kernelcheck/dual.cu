// Every kernel that csrc/cuda/dual.cu launches, without PyTorch: what nvcc makes of them is checked for each architecture.
#include "dual.cuh"

namespace armor::cuda {

template __global__ void dual<float, WarpGroup>(Rows<float>, Workspace);
template __global__ void dual<float, BlockGroup>(Rows<float>, Workspace);
template __global__ void dual<float, GridGroup>(Rows<float>, Workspace);
template __global__ void dual<double, WarpGroup>(Rows<double>, Workspace);
template __global__ void dual<double, BlockGroup>(Rows<double>, Workspace);
template __global__ void dual<double, GridGroup>(Rows<double>, Workspace);
template __global__ void dual_backward<float>(Gradients<float>);
template __global__ void dual_backward<double>(Gradients<double>);

}  // namespace armor::cuda
