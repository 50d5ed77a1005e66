// SPDX-License-Identifier: Apache-2.0
//
// fastrnn::rnn: one autograd node around rnn_forward and rnn_backward, which check. The second
// derivative is taken through PyTorch's own differentiable loop over the same arguments.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/rnn_relu.h>
#include <ATen/ops/rnn_tanh.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include <mutex>

#include "rnn.h"

namespace fastrnn {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

/// What the node remembers. `participants` are input, hx (may be undefined) and the weights, in the
/// order of the node's inputs.
struct Saved {
  RnnOptions options;
  variable_list participants;
  OptionalTensor batch_sizes;
  variable_list layer_outputs;

  static void remember(AutogradContext* ctx, const RnnOptions& options, const Tensor& input,
                       const OptionalTensor& hx, at::TensorList weights,
                       const OptionalTensor& batch_sizes, at::TensorList layer_outputs) {
    variable_list tensors;
    tensors.reserve(2 + weights.size() + layer_outputs.size());
    tensors.push_back(input);
    tensors.push_back(hx.value_or(Tensor()));
    tensors.insert(tensors.end(), weights.begin(), weights.end());
    tensors.insert(tensors.end(), layer_outputs.begin(), layer_outputs.end());
    ctx->save_for_backward(std::move(tensors));
    // Not among the tensors: hooks that store these in another way expect what has a gradient.
    ctx->saved_data["batch_sizes"] = batch_sizes;
    ctx->saved_data["options"] =
        std::vector<int64_t>{options.nonlinearity == "relu", options.bias, options.num_layers,
                             options.bidirectional, options.batch_first};
  }

  explicit Saved(AutogradContext* ctx) {
    const std::vector<int64_t> saved = ctx->saved_data.at("options").toIntVector();
    options = {saved[0] ? "relu" : "tanh", saved[1] != 0, saved[2], saved[3] != 0, saved[4] != 0};
    batch_sizes = ctx->saved_data.at("batch_sizes").toOptional<Tensor>();
    variable_list all = ctx->get_saved_variables();
    const size_t count = 2 + options.num_layers * options.directions() * options.weights_per_cell();
    const auto from = std::make_move_iterator(all.begin());
    participants.assign(from, from + count);
    layer_outputs.assign(from + count, std::make_move_iterator(all.end()));
  }

  bool packed() const { return batch_sizes.has_value(); }
  bool unbatched() const { return !packed() && participants[0].dim() == 2; }
};

/// First derivative: the hand-written backward.
variable_list fused_backward(const Saved& saved, const variable_list& grads,
                             const std::vector<bool>& needs) {
  at::AutoDispatchBelowADInplaceOrView guard;  // nothing here is recorded
  const at::TensorList weights(saved.participants.data() + 2, saved.participants.size() - 2);
  auto [grad_input, grad_hx, grad_weights] =
      rnn_backward(optional(grads[0]), optional(grads[1]), saved.participants[0],
                   optional(saved.participants[1]), weights, saved.batch_sizes, saved.layer_outputs,
                   saved.options, needs);
  variable_list result{grad_input, grad_hx};
  for (size_t i = 0; i < weights.size(); ++i)
    result.push_back(needs[2 + i] ? grad_weights[i] : Tensor());
  return result;
}

/// In its scope PyTorch's RNN on a GPU is its own loop: cuDNN has no second derivative. The setting
/// is the whole process's: meanwhile other threads do without cuDNN too. The first scope of several
/// at a time keeps the setting and the last one puts it back.
class WithoutCudnn {
 public:
  explicit WithoutCudnn(bool on_gpu) : on_gpu_(on_gpu) {
    if (!on_gpu_) return;
    const std::lock_guard lock(mutex_);
    if (scopes_++ > 0) return;
    before_ = at::globalContext().userEnabledCuDNN();
    at::globalContext().setUserEnabledCuDNN(false);
  }
  ~WithoutCudnn() {
    if (!on_gpu_) return;
    const std::lock_guard lock(mutex_);
    if (--scopes_ == 0) at::globalContext().setUserEnabledCuDNN(before_);
  }

 private:
  inline static std::mutex mutex_;
  inline static int scopes_ = 0;
  inline static bool before_ = false;
  const bool on_gpu_;
};

/// The derivative by PyTorch's own operators, differentiable where grad mode is on: the forward
/// again, by PyTorch's loop, then its gradient. Views stand for the participants, so that a weight
/// which is a function of another (tied, parametrized) gets its own gradient and no more.
variable_list composite_backward(const Saved& saved, const variable_list& grads,
                                 const std::vector<bool>& needs) {
  const bool create_graph = at::GradMode::is_enabled();
  at::AutoGradMode record(true);
  const RnnOptions& options = saved.options;
  variable_list views;
  for (const Tensor& t : saved.participants) views.push_back(t.defined() ? t.view_as(t) : t);
  const bool unbatched = saved.unbatched();
  const bool batch_first = options.batch_first && !unbatched;
  const Tensor input = unbatched ? views[0].unsqueeze(1) : views[0];
  const std::vector<Tensor> weights(views.begin() + 2, views.end());
  Tensor hx = views[1];
  if (!hx.defined()) {
    const int64_t batch = saved.packed() ? saved.batch_sizes->select(0, 0).item<int64_t>()
                                         : input.size(batch_first ? 0 : 1);
    hx = at::zeros({options.num_layers * options.directions(), batch, weights[1].size(1)},
                   input.options());
  } else if (unbatched) {
    hx = hx.unsqueeze(1);
  }
  const auto loop = [&](auto padded, auto packed) {
    return saved.packed() ? packed(input, *saved.batch_sizes, hx, weights, options.bias,
                                   options.num_layers, 0.0, false, options.bidirectional)
                          : padded(input, hx, weights, options.bias, options.num_layers, 0.0, false,
                                   options.bidirectional, batch_first);
  };
  using Padded = std::tuple<Tensor, Tensor> (*)(const Tensor&, const Tensor&, at::TensorList, bool,
                                                int64_t, double, bool, bool, bool);
  using Packed = std::tuple<Tensor, Tensor> (*)(const Tensor&, const Tensor&, const Tensor&,
                                                at::TensorList, bool, int64_t, double, bool, bool);
  const WithoutCudnn without_cudnn(input.is_cuda());
  auto [output, h_n] =
      options.nonlinearity == "tanh"
          ? loop(static_cast<Padded>(&at::rnn_tanh), static_cast<Packed>(&at::rnn_tanh))
          : loop(static_cast<Padded>(&at::rnn_relu), static_cast<Packed>(&at::rnn_relu));
  if (unbatched) {
    output = output.squeeze(1);
    h_n = h_n.squeeze(1);
  }

  variable_list outputs, cotangents, wanted;
  if (grads[0].defined()) outputs.push_back(output), cotangents.push_back(grads[0]);
  if (grads[1].defined()) outputs.push_back(h_n), cotangents.push_back(grads[1]);
  for (size_t i = 0; i < needs.size(); ++i)
    if (needs[i]) wanted.push_back(views[i]);
  const variable_list gradients = torch::autograd::grad(outputs, wanted, cotangents,
                                                        /*retain_graph=*/create_graph, create_graph,
                                                        /*allow_unused=*/true);
  variable_list result(needs.size());
  for (size_t i = 0, j = 0; i < needs.size(); ++i) {
    if (!needs[i]) continue;
    result[i] = gradients[j].defined() ? gradients[j] : at::zeros_like(views[i]);
    ++j;
  }
  return result;
}

/// Whether vmap runs backward on many cotangents at once, which the fused operator has no rule for.
bool is_batched(const Tensor& t) {
  return t.defined() && t.key_set().has_any(c10::DispatchKeySet(
                            {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched}));
}

class RnnFunction : public torch::autograd::Function<RnnFunction> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  // The weights travel as separate variables: the node gets one edge for each.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, const OptionalTensor& batch_sizes,
                               std::string_view nonlinearity, bool bias, int64_t num_layers,
                               bool bidirectional, bool batch_first) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const RnnOptions options{nonlinearity, bias, num_layers, bidirectional, batch_first};
    const OptionalTensor sizes = copy_batch_sizes(batch_sizes);
    auto [output, h_n, layer_outputs] = rnn_forward(input, hx, weights, sizes, options, true);
    Saved::remember(ctx, options, input, hx, weights, sizes, layer_outputs);
    ctx->set_materialize_grads(false);
    return {output, h_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    // The node's edges: input, hx where given, the weights.
    const bool has_hx = saved.participants[1].defined();
    std::vector<bool> needs(saved.participants.size());
    for (size_t i = 0, edge = 0; i < needs.size(); ++i)
      needs[i] = i == 1 && !has_hx ? false : ctx->needs_input_grad(edge++);
    variable_list result;
    if (grads[0].defined() || grads[1].defined()) {
      const bool composite =
          at::GradMode::is_enabled() || is_batched(grads[0]) || is_batched(grads[1]);
      result =
          composite ? composite_backward(saved, grads, needs) : fused_backward(saved, grads, needs);
    } else {
      result.resize(needs.size());
    }
    // One gradient per argument of forward, a list counting as its elements: batch_sizes and the
    // five options have none.
    result.resize(result.size() + 6);
    return result;
  }
};

bool any_requires_grad(const Tensor& input, const OptionalTensor& hx, at::TensorList weights) {
  if (!at::GradMode::is_enabled()) return false;
  if (input.requires_grad() || (hx.has_value() && hx->requires_grad())) return true;
  for (const Tensor& w : weights)
    if (w.requires_grad()) return true;
  return false;
}

/// A C++ node would drop forward-mode tangents silently.
void check_no_tangent(const Tensor& input, const OptionalTensor& hx, at::TensorList weights) {
  // Without a level there are none; each tensor would lock to tell.
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr) return;
  bool tangent = input._fw_grad(0).defined() || (hx.has_value() && hx->_fw_grad(0).defined());
  for (const Tensor& w : weights) tangent = tangent || w._fw_grad(0).defined();
  TORCH_CHECK(!tangent,
              "fastrnn::rnn has no forward-mode derivative: call fastrnn.RNN or "
              "fastrnn.functional.rnn, which take PyTorch's own path for it.");
}

/// Nothing to record, or no autograd keys (inference mode).
std::tuple<Tensor, Tensor> rnn_inference(const Tensor& input, const OptionalTensor& hx,
                                         at::TensorList weights, const OptionalTensor& batch_sizes,
                                         std::string_view nonlinearity, bool bias,
                                         int64_t num_layers, bool bidirectional, bool batch_first) {
  auto [output, h_n, kept] =
      rnn_forward(input, hx, weights, batch_sizes,
                  {nonlinearity, bias, num_layers, bidirectional, batch_first}, /*keep=*/false);
  return {output, h_n};
}

std::tuple<Tensor, Tensor> rnn_autograd(const Tensor& input, const OptionalTensor& hx,
                                        at::TensorList weights, const OptionalTensor& batch_sizes,
                                        std::string_view nonlinearity, bool bias,
                                        int64_t num_layers, bool bidirectional, bool batch_first) {
  check_no_tangent(input, hx, weights);
  if (!any_requires_grad(input, hx, weights)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return rnn_inference(input, hx, weights, batch_sizes, nonlinearity, bias, num_layers,
                         bidirectional, batch_first);
  }
  auto result = RnnFunction::apply(input, hx, weights, batch_sizes, nonlinearity, bias, num_layers,
                                   bidirectional, batch_first);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) { m.impl("rnn", rnn_autograd); }
TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) { m.impl("rnn", rnn_inference); }

}  // namespace fastrnn
