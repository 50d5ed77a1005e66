// SPDX-License-Identifier: Apache-2.0
//
// fastrnn._C: loading it registers the operators; its functions say how it was built and what it
// would do here.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "rnn.h"

namespace py = pybind11;

namespace {

/// The operator fastrnn::rnn, called without torch.ops, whose parsing of the schema costs as much
/// as a small recurrence.
std::tuple<at::Tensor, at::Tensor> rnn(const at::Tensor& input, const std::optional<at::Tensor>& hx,
                                       const std::vector<at::Tensor>& weights,
                                       const std::optional<at::Tensor>& batch_sizes,
                                       const std::string& nonlinearity, bool bias,
                                       int64_t num_layers, bool bidirectional, bool batch_first) {
  return fastrnn::rnn(input, hx, weights, batch_sizes, nonlinearity, bias, num_layers,
                      bidirectional, batch_first);
}

/// Whether nothing but autograd, autocast and inference mode takes part in what operators do now.
bool is_plain_eager() {
  const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  return !keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !at::impl::torch_function_mode_enabled() &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         !torch::jit::tracer::isTracing();
}

bool is_plain_cpu_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;  // Tensor or Parameter, no subclass of them
  const at::Tensor& t = THPVariable_Unpack(object);
  const at::ScalarType type = t.scalar_type();
  return t.is_cpu() && t.layout() == at::kStrided &&
         (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf);
}

/// A short way to the answer yes of functional.takes_fused_path, for the calls that are most
/// frequent; false says nothing.
bool is_ordinary_call(py::handle input, const py::list& weights, py::handle hx) {
  if (!is_plain_eager() || !is_plain_cpu_tensor(input.ptr())) return false;
  if (!hx.is_none() && !is_plain_cpu_tensor(hx.ptr())) return false;
  for (py::handle weight : weights)
    if (!is_plain_cpu_tensor(weight.ptr())) return false;
  return true;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = false;
  return info;
}

py::dict cpu_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t directions,
                  int64_t element_size) {
  const bool converts = element_size < 4;
  const fastrnn::cpu::LayerShape shape{
      T, B, I, H, T * B, directions, converts ? 4 : element_size, converts};
  const fastrnn::cpu::Plan plan = fastrnn::cpu::plan_layer(shape, at::get_num_threads());
  py::dict result;
  result["fuse_input"] = plan.fuse_input;
  result["pack_weights"] = plan.pack_weights;
  result["own_outer_product"] = plan.own_outer_product;
  result["parallel"] = plan.parallel;
  result["row_blocks"] = plan.row_blocks;
  result["backward_steps"] = plan.backward_steps;
  result["convert_steps"] = plan.convert_steps;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastrnn's operators (torch.ops.fastrnn) and facts about this build.";
  m.def("rnn", torch::wrap_pybind_function_no_gil(rnn),
        "torch.ops.fastrnn.rnn for eager calls with positional arguments.");
  m.def("is_ordinary_call", &is_ordinary_call,
        "Whether functional.takes_fused_path says yes without a closer look.");
  m.def("build_info", &build_info, "How this extension was built.");
  m.def(
      "cpu_capability", [] { return std::string(fastrnn::cpu::capability().name); },
      "The kernels in use: 'default', 'avx2' or 'avx512' (see ATEN_CPU_CAPABILITY).");
  m.def("cpu_plan", &cpu_plan, py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("directions") = 1, py::arg("element_size") = 4,
        "How one layer of this shape runs on the CPU with the current number of threads.");
}
