// SPDX-License-Identifier: Apache-2.0
//
// fastrnn._C: loading it registers the operators; its functions say how it was built and what it
// would do here.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/tensors.h"
#include "cuda/plan.h"
#include "rnn.h"
#ifdef FASTRNN_CUDA
#include "cuda/engine.h"
#endif

namespace py = pybind11;

namespace {

void check_type(bool right, py::handle value, const char* name, const char* expected) {
  if (!right)
    throw py::type_error(std::string("rnn(): argument '") + name + "' must be " + expected +
                         ", not " + Py_TYPE(value.ptr())->tp_name);
}

/// nn.RNN takes no number for a flag either.
bool flag(py::handle value, const char* name) {
  check_type(PyBool_Check(value.ptr()), value, name, "bool");
  return value.ptr() == Py_True;
}

/// The operator fastrnn::rnn, called without torch.ops, whose parsing of the schema costs as much
/// as a small recurrence.
std::tuple<at::Tensor, at::Tensor> rnn(const at::Tensor& input, const std::optional<at::Tensor>& hx,
                                       const std::vector<at::Tensor>& weights,
                                       const std::optional<at::Tensor>& batch_sizes,
                                       py::handle nonlinearity, py::handle bias,
                                       py::handle num_layers, py::handle bidirectional,
                                       py::handle batch_first) {
  check_type(PyUnicode_Check(nonlinearity.ptr()), nonlinearity, "nonlinearity", "str");
  check_type(PyLong_CheckExact(num_layers.ptr()), num_layers, "num_layers", "int");
  const auto name = nonlinearity.cast<std::string>();
  const auto layers = num_layers.cast<int64_t>();
  const bool has_bias = flag(bias, "bias"), both = flag(bidirectional, "bidirectional");
  const bool batch_major = flag(batch_first, "batch_first");
  py::gil_scoped_release no_gil;
  return fastrnn::rnn(input, hx, weights, batch_sizes, name, has_bias, layers, both, batch_major);
}

/// Whether a function mode takes part in what operators do now. That of torch.set_default_device,
/// or of a torch.device, watches nothing but the functions that make tensors out of nothing.
bool has_function_mode() {
  using TLS = at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) return false;
  return TLS::stack_len() > 1 ||
         !py::isinstance(TLS::get_stack_at(0)->ptr(getPyInterpreter()),
                         py::module_::import("torch.utils._device").attr("DeviceContext"));
}

/// Whether nothing but autograd, autocast and inference mode takes part in what operators do now.
bool is_plain_eager() {
  const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  return !keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && !has_function_mode() &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         !torch::jit::tracer::isTracing();
}

constexpr const char* kDescribeGpu = "describe one by major, multiprocessors and shared_bytes";

#ifdef FASTRNN_CUDA
constexpr bool kHasCuda = true;
bool is_on_fused_gpu(const at::Tensor& t) {
  return t.is_cuda() && fastrnn::cuda::runs_on(t.get_device());
}
fastrnn::cuda::Gpu current_gpu() {
  TORCH_CHECK(at::hasCUDA(), "cuda_plan: there is no GPU here; ", kDescribeGpu);
  return fastrnn::cuda::current_gpu();
}
#else
constexpr bool kHasCuda = false;
bool is_on_fused_gpu(const at::Tensor&) { return false; }
fastrnn::cuda::Gpu current_gpu() {
  TORCH_CHECK(false, "cuda_plan: built without CUDA, fastrnn knows no GPU; ", kDescribeGpu);
}
#endif

/// Whether `object` is a tensor of a subclass that overrides neither functions nor operators.
bool is_plain_subclass(PyObject* object) {
  if (!THPVariable_Check(object)) return false;
  const auto disabled = py::module_::import("torch._C").attr("_disabled_torch_function_impl");
  return !THPVariable_Unpack(object).key_set().has(c10::DispatchKey::Python) &&
         py::type::handle_of(object).attr("__torch_function__").is(disabled);
}

bool is_plain_tensor(PyObject* object) {
  return (THPVariable_CheckExact(object) || is_plain_subclass(object)) &&
         THPVariable_Unpack(object).layout() == at::kStrided;
}

/// functional.takes_fused_path, but for compiled calls.
bool takes_fused_path(py::object input, const py::sequence& weights, py::handle hx) {
  if (PyTuple_Check(input.ptr()) &&
      py::isinstance(input, py::module_::import("torch.nn.utils.rnn").attr("PackedSequence")))
    input = input.attr("data");
  if (!is_plain_eager() || !is_plain_tensor(input.ptr())) return false;
  if (!hx.is_none() && !is_plain_tensor(hx.ptr())) return false;
  bool first = true;
  for (const py::object weight : weights) {  // which a sequence may make anew
    if (!is_plain_tensor(weight.ptr())) return false;
    const at::Tensor& w = THPVariable_Unpack(weight.ptr());
    if (!w.is_cpu() && !is_on_fused_gpu(w)) return false;
    if (first && !fastrnn::is_fused_dtype(w.scalar_type())) return false;
    first = false;
  }
  return true;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = kHasCuda;
  info["cuda_reason"] = FASTRNN_CUDA_REASON;
  return info;
}

const char* name_of(fastrnn::cpu::Maker maker) {
  constexpr const char* kNames[] = {"in_step", "panels", "as_is", "aten"};
  return kNames[static_cast<int>(maker)];
}

const char* name_of(fastrnn::cpu::Sharing sharing) {
  constexpr const char* kNames[] = {"by_rows", "by_slabs", "beside"};
  return kNames[static_cast<int>(sharing)];
}

py::dict cpu_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t directions,
                  at::ScalarType dtype, std::optional<int64_t> rows) {
  TORCH_CHECK_VALUE(T > 0 && B >= 0 && I >= 0 && H > 0 && directions > 0,
                    "cpu_plan: T, H and directions must be positive, B and I not negative");
  TORCH_CHECK_VALUE(!rows.has_value() || (*rows >= B && *rows <= T * B),
                    "cpu_plan: rows must be from B to T * B");
  TORCH_CHECK_VALUE(fastrnn::is_fused_dtype(dtype), "cpu_plan: no kernels for ", dtype);
  fastrnn::cpu::LayerShape shape{T, B, I, H, directions, rows.value_or(T * B), rows.has_value()};
  fastrnn::cpu::set_type(shape, dtype);
  const fastrnn::cpu::Plan plan = fastrnn::cpu::plan_layer(shape, at::get_num_threads());
  py::dict result;
  result["input"] = name_of(plan.input);
  result["state"] = name_of(plan.state);
  result["delta"] = name_of(plan.delta);
  result["weight_grads"] = name_of(plan.weight_grads);
  result["input_grad"] = name_of(plan.input_grad);
  result["converts"] = plan.converts;
  result["sharing"] = name_of(plan.sharing);
  result["threads"] = plan.threads;
  result["row_blocks"] = plan.row_blocks;
  result["column_blocks"] = plan.column_blocks;
  result["chunk_steps"] = plan.chunk_steps;
  result["convert_steps"] = plan.convert_steps;
  return result;
}

/// On the GPU described, or the current one; what is not described is that of the current one.
py::dict cuda_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t directions,
                   int64_t element_size, std::optional<int> major,
                   std::optional<int> multiprocessors, std::optional<int64_t> shared_bytes) {
  TORCH_CHECK_VALUE(T > 0 && B >= 0 && I >= 0 && H >= 0 && (directions == 1 || directions == 2),
                    "cuda_plan: T must be positive, B, I and H not negative, directions 1 or 2");
  TORCH_CHECK_VALUE(element_size == 2 || element_size == 4 || element_size == 8,
                    "cuda_plan: element_size must be 2, 4 or 8");
  TORCH_CHECK_VALUE(
      multiprocessors.value_or(1) > 0 && major.value_or(0) >= 0 && shared_bytes.value_or(0) >= 0,
      "cuda_plan: multiprocessors must be positive, major and shared_bytes not negative");
  namespace cuda = fastrnn::cuda;
  const cuda::Type type = element_size == 8   ? cuda::Type::kDouble
                          : element_size == 4 ? cuda::Type::kFloat
                                              : cuda::Type::kHalf;
  const bool described = major && multiprocessors && shared_bytes;
  cuda::Gpu gpu = described ? cuda::Gpu() : current_gpu();
  gpu.major = major.value_or(gpu.major);
  gpu.multiprocessors = multiprocessors.value_or(gpu.multiprocessors);
  gpu.shared_bytes = shared_bytes.value_or(gpu.shared_bytes);
  const cuda::Plan plan = cuda::plan_layer({T, B, I, H, directions, type}, gpu);
  py::dict result;
  result["walk"] = cuda::name_of(plan.walk);
  // Of the batch: in each block of the block walk in float, or in each group of the group walk.
  result["rows"] = plan.walk == cuda::Walk::kGroup ? plan.groups.rows() : plan.block_rows;
  result["fuse_input"] = plan.fuse_input;
  result["chunk_steps"] = plan.chunk_steps;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastrnn's operators (torch.ops.fastrnn) and facts about this build.";
  m.def("rnn", torch::wrap_pybind_function(rnn),
        "torch.ops.fastrnn.rnn for eager calls with positional arguments.");
  m.def("takes_fused_path", &takes_fused_path,
        "functional.takes_fused_path for calls that are not compiled.");
  py::list device_types;
  device_types.append("cpu");
  if (kHasCuda) device_types.append("cuda");
  m.attr("device_types") = py::tuple(device_types);
  m.def("build_info", &build_info, "How this extension was built.");
  m.def(
      "cpu_capability", [] { return std::string(fastrnn::cpu::capability().name); },
      "The kernels in use: 'default', 'avx2' or 'avx512' (see ATEN_CPU_CAPABILITY).");
  m.def("cpu_plan", torch::wrap_pybind_function(cpu_plan), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("directions") = 1, py::arg("dtype") = at::kFloat,
        py::arg("rows") = py::none(),
        "How a layer of this shape runs on the CPU with the current number of threads. rows: of "
        "packed data, whose longest sequence has T steps.");
  m.def("cuda_plan", torch::wrap_pybind_function(cuda_plan), py::arg("T"), py::arg("B"),
        py::arg("I"), py::arg("H"), py::arg("directions") = 1, py::arg("element_size") = 4,
        py::kw_only(), py::arg("major") = py::none(), py::arg("multiprocessors") = py::none(),
        py::arg("shared_bytes") = py::none(),
        "How one layer of this shape runs on a GPU of these properties, or on the current one: "
        "major of its compute capability, its multiprocessors, shared memory of a block.");
}
