// SPDX-License-Identifier: Apache-2.0
//
// Argument checks, worded as nn.RNN words them, and the calls through the dispatcher. Each operator
// checks its own arguments, since each can be called by itself; nothing below them checks again,
// but for the dtype.
#include "rnn.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

#include <array>
#include <string>

namespace fastrnn {

namespace {

/// "torch.float32": Python's name of a dtype.
std::string dtype_name(at::ScalarType type) {
  return c10::str("torch.", c10::getDtypeNames(type).first);
}

/// The tensor method that converts to `type`, as a user writes it.
std::string cast_method(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ".float()";
    case at::kDouble:
      return ".double()";
    case at::kHalf:
      return ".half()";
    case at::kBFloat16:
      return ".bfloat16()";
    default:
      return ".to(" + dtype_name(type) + ")";
  }
}

void check_input_dtype(const Tensor& input, const Tensor& weight) {
  const at::ScalarType given = input.scalar_type(), wanted = weight.scalar_type();
  if (given == wanted) return;
  TORCH_CHECK_VALUE(false, "RNN input dtype (", dtype_name(given),
                    ") does not match weight dtype (", dtype_name(wanted),
                    "). Convert input: input.to(", dtype_name(wanted),
                    "), or convert model: model.to(", dtype_name(given), ")",
                    at::isFloatingType(given) || at::isComplexType(given)
                        ? ". "
                        : ". A model cannot have integer weights, so convert the input. ",
                    "The input is ", c10::toString(given), ", the weights are ",
                    c10::toString(wanted), ": pass input", cast_method(wanted), ".");
}

/// "(num_layers * num_directions, batch, hidden_size) = (2, 5, 4)": what hx must be.
std::string hidden_layout(const RnnOptions& options, bool unbatched, const c10::SymInt& batch,
                          const c10::SymInt& hidden_size) {
  const int64_t rows = options.num_layers * options.directions();
  return unbatched ? c10::str("(num_layers * num_directions, hidden_size) = (", rows, ", ",
                              hidden_size, ")")
                   : c10::str("(num_layers * num_directions, batch, hidden_size) = (", rows, ", ",
                              batch, ", ", hidden_size, ")");
}

/// hx [L*D, B, H], or [L*D, H] for unbatched input.
void check_hidden(const Tensor& hx, const Tensor& input, const c10::SymInt& batch,
                  const RnnOptions& options, const c10::SymInt& hidden_size, bool unbatched,
                  bool batch_first) {
  const std::array<c10::SymInt, 3> expected{options.num_layers * options.directions(), batch,
                                            hidden_size};
  auto sizes = hx.sym_sizes().vec();
  if (unbatched) sizes.insert(sizes.begin() + 1, 1);
  TORCH_CHECK(
      c10::SymIntArrayRef(sizes) == c10::SymIntArrayRef(expected), "Expected hidden size (",
      expected[0], ", ", batch, ", ", hidden_size, "), got ", c10::SymIntArrayRef(sizes),
      ". For this ", unbatched ? "unbatched " : "", "input hx must be ",
      hidden_layout(options, unbatched, batch, hidden_size),
      batch_first ? ", also with batch_first=True, which applies to input and output only" : "",
      ". hx was ", hx.sym_sizes(), ".");
  TORCH_CHECK(hx.scalar_type() == input.scalar_type(),
              "mat1 and mat2 must have the same dtype, but got ", c10::toString(hx.scalar_type()),
              " and ", c10::toString(input.scalar_type()), ". The initial hidden state hx is ",
              dtype_name(hx.scalar_type()), ", input and weights are ",
              dtype_name(input.scalar_type()), ": pass hx", cast_method(input.scalar_type()), ".");
}

void check_weights(const Tensor& input, at::TensorList weights, const RnnOptions& options,
                   const c10::SymInt& hidden_size) {
  const Tensor& first = weights[0];
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    for (int64_t direction = 0; direction < options.directions(); ++direction) {
      const int64_t start = (layer * options.directions() + direction) * options.weights_per_cell();
      const c10::SymInt input_size =
          layer == 0 ? first.sym_size(1) : hidden_size * options.directions();
      for (int64_t i = 0; i < options.weights_per_cell(); ++i) {
        const Tensor& w = weights[start + i];
        TORCH_CHECK_TYPE(w.defined(), "expected Tensor as element ", start + i,
                         " in argument 2, but got NoneType");
        const std::array<c10::SymInt, 2> matrix{hidden_size, i == 0 ? input_size : hidden_size};
        const c10::SymIntArrayRef expected(matrix.data(), i < 2 ? 2 : 1);  // a bias has no columns
        TORCH_CHECK(w.sym_sizes() == expected, "weight ", start + i, " (layer ", layer,
                    ", direction ", direction, ") has shape ", w.sym_sizes(), ", expected ",
                    expected, " for w_ih (H, I), w_hh (H, H), b_ih (H) and b_hh (H).");
        TORCH_CHECK(w.device() == input.device(),
                    "Input and parameter tensors are not at the same device, found input tensor "
                    "at ",
                    input.device(), " and parameter tensor at ", w.device(),
                    ". Move one: input.to(", w.device(), ") or model.to(", input.device(), ").");
        TORCH_CHECK(w.scalar_type() == first.scalar_type(),
                    "mat1 and mat2 must have the same dtype, but got ",
                    c10::toString(first.scalar_type()), " and ", c10::toString(w.scalar_type()),
                    ". Weight ", start + i, " differs in dtype from the first: use model.to(",
                    dtype_name(first.scalar_type()), ").");
      }
    }
  }
}

/// Too few and too many are both "more weights" to nn.RNN.
void check_weight_count(int64_t count, const RnnOptions& options) {
  const int64_t per_layer = options.directions() * options.weights_per_cell();
  if (count % per_layer == 0 && count / per_layer == options.num_layers) return;
  TORCH_CHECK(false,
              count % options.weights_per_cell() != 0 ? "got an incorrect number of RNN parameters"
              : count % per_layer != 0
                  ? "Odd number of params or hiddens given to a bidirectional RNN"
                  : "Expected more weights in stacked_rnn",
              ": got ", count, ", but num_layers=", options.num_layers,
              ", bias=", options.bias ? "True" : "False",
              ", bidirectional=", options.bidirectional ? "True" : "False", " take ", per_layer,
              " for each layer.");
}

/// Whether a tensor holds numbers that can be looked at: those that a tracer sees do not.
bool has_values(const Tensor& t) { return !t.is_meta() && !t.key_set().has_any(c10::python_ks); }

/// `known`: it has values that can be looked at.
void check_is_batch_sizes(const Tensor& batch_sizes, bool known) {
  TORCH_CHECK_INDEX(batch_sizes.sym_numel() > 0,
                    "index 0 is out of bounds for dimension 0 with size 0: batch_sizes is empty");
  if (!known) return;
  TORCH_CHECK(batch_sizes.scalar_type() == at::kLong, "expected scalar type Long but found ",
              c10::toString(batch_sizes.scalar_type()),
              ". batch_sizes must be torch.int64: use pack_padded_sequence or pack_sequence.");
  TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu(),
              "batch_sizes must be a 1-D CPU tensor, as pack_padded_sequence makes it");
}

void check_rows(const Tensor& batch_sizes, const Tensor& input) {
  const Tensor sizes = batch_sizes.contiguous();
  const int64_t* n = sizes.const_data_ptr<int64_t>();
  const int64_t steps = sizes.numel();
  int64_t rows = 0;
  for (int64_t t = 0; t < steps; ++t) {
    TORCH_CHECK(n[t] >= 0 && (t == 0 || n[t] <= n[t - 1]),
                "batch_sizes must not be negative and must not grow, got ", n[t], " at step ", t,
                ": sequences are sorted by decreasing length, as pack_padded_sequence does.");
    TORCH_CHECK(rows + n[t] <= input.size(0), "start (", rows, ") + length (", n[t],
                ") exceeds dimension size (", input.size(0),
                "). The packed data has fewer rows than the sum of batch_sizes.");
    rows += n[t];
  }
  // nn.RNN ignores surplus rows in one direction and shifts the other by them: silent nonsense.
  TORCH_CHECK(rows == input.size(0), "the packed data has ", input.size(0),
              " rows, but batch_sizes add up to ", rows, ": drop the surplus rows.");
}

}  // namespace

Cell cell_of(at::TensorList weights, const RnnOptions& options, int64_t layer, int64_t direction) {
  const auto* w = &weights[(layer * options.directions() + direction) * options.weights_per_cell()];
  return options.bias ? Cell{w[0], w[1], w[2], w[3]} : Cell{w[0], w[1], Tensor(), Tensor()};
}

void check_arguments(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                     const OptionalTensor& batch_sizes, const RnnOptions& options,
                     bool batch_first) {
  const bool packed = batch_sizes.has_value(), unbatched = !packed && input.dim() == 2;
  TORCH_CHECK_VALUE(options.nonlinearity == "tanh" || options.nonlinearity == "relu",
                    "Unknown nonlinearity '", options.nonlinearity,
                    "'. Select from 'tanh' or 'relu'.");
  TORCH_CHECK_VALUE(options.num_layers > 0, "num_layers must be greater than zero");
  check_weight_count(weights.size(), options);
  const Tensor &w_ih = weights[0], &w_hh = weights[1];
  TORCH_CHECK(w_ih.dim() == 2 && w_hh.dim() == 2, "w_ih and w_hh must be 2-D, got ", w_ih.dim(),
              "-D and ", w_hh.dim(), "-D");
  // Where w_ih and w_hh disagree, the other dimension of w_hh tells which of them is wrong.
  const c10::SymInt hidden_size = w_hh.sym_size(w_ih.sym_size(0) == w_hh.sym_size(0) ? 0 : 1);

  TORCH_CHECK_VALUE(hidden_size > 0, "hidden_size must be greater than zero: w_hh is (H, H).");

  const bool known_sizes = packed && has_values(*batch_sizes);
  if (packed) {
    check_is_batch_sizes(*batch_sizes, known_sizes);
  } else {
    TORCH_CHECK_VALUE(input.dim() == 2 || input.dim() == 3,
                      "RNN: Expected input to be 2D or 3D, got ", input.dim(),
                      "D tensor instead. Use (T, I) for one sequence, ",
                      batch_first ? "(B, T, I)" : "(T, B, I)", " for a batch.");
  }
  // While tracing, hx alone says how many sequences are packed; rnn_forward looks when it runs.
  const c10::SymInt batch = known_sizes ? c10::SymInt(batch_sizes->select(0, 0).item<int64_t>())
                            : packed    ? (hx.has_value() ? hx->sym_size(1) : c10::SymInt(0))
                            : unbatched ? c10::SymInt(1)
                                        : input.sym_size(batch_first ? 0 : 1);
  if (!packed && hx.has_value()) {
    TORCH_CHECK(hx->dim() == input.dim(), "For ", unbatched ? "unbatched 2-D" : "batched 3-D",
                " input, hx should also be ", input.dim(), "-D but got ", hx->dim(),
                "-D tensor. Its layout is ", hidden_layout(options, unbatched, batch, hidden_size),
                ".");
  }
  check_input_dtype(input, w_ih);
  if (packed) {
    TORCH_CHECK(input.dim() == 2, "input must have 2 dimensions, got ", input.dim(),
                ". The data of a PackedSequence is (sum of lengths, input_size).");
  }
  TORCH_CHECK(input.sym_size(-1) == w_ih.sym_size(1),
              "input.size(-1) must be equal to input_size. Expected ", w_ih.sym_size(1), ", got ",
              input.sym_size(-1), ". The last dimension of input holds the features.");
  if (known_sizes) check_rows(*batch_sizes, input);
  if (hx.has_value()) {
    check_hidden(*hx, input, batch, options, hidden_size, unbatched, batch_first);
    TORCH_CHECK(hx->device() == input.device(),
                "Input and hidden tensors are not at the same device, found input tensor at ",
                input.device(), " and hidden tensor at ", hx->device(), ".");
  }
  check_weights(input, weights, options, hidden_size);
  TORCH_CHECK(packed || input.sym_size(unbatched || !batch_first ? 0 : 1) > 0,
              "Expected sequence length to be larger than 0 in RNN. Drop empty sequences.");
}

void check_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                   const OptionalTensor& batch_sizes, const RnnOptions& options) {
  check_arguments(input, hx, weights, batch_sizes, options, /*batch_first=*/false);
  TORCH_CHECK(batch_sizes.has_value() || input.dim() == 3,
              "fastrnn::rnn_forward: input must be (T, B, I) or, with batch_sizes, (N, I), got ",
              input.sizes());
}

void check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                    const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                    const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                    const RnnOptions& options, size_t needs_count) {
  check_forward(input, hx, weights, batch_sizes, options);
  const auto check = [&](const Tensor& t, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == input.scalar_type() &&
                    t.device() == input.device(),
                "fastrnn::rnn_backward: ", name, " must be ", sizes, ", ",
                dtype_name(input.scalar_type()), " on ", input.device(), ", got ", t.sizes(), ", ",
                dtype_name(t.scalar_type()), " on ", t.device());
  };
  TORCH_CHECK(static_cast<int64_t>(layer_outputs.size()) == options.num_layers &&
                  needs_count == weights.size() + 2,
              "fastrnn::rnn_backward: one layer output for each layer and one need for input, hx "
              "and each weight are expected, got ",
              layer_outputs.size(), " and ", needs_count);
  const int64_t D = options.directions(), H = weights[1].size(0);
  const int64_t B =
      batch_sizes.has_value() ? batch_sizes->select(0, 0).item<int64_t>() : input.size(1);
  auto sizes = input.sizes().vec();
  sizes.back() = D * H;
  for (const Tensor& y : layer_outputs) check(y, sizes, "a layer output");
  if (grad_output.has_value() && grad_output->defined()) check(*grad_output, sizes, "grad_output");
  if (grad_h_n.has_value() && grad_h_n->defined())
    check(*grad_h_n, {options.num_layers * D, B, H}, "grad_h_n");
}

Tensor to_time_major(const Tensor& input, bool packed, bool batch_first) {
  if (packed) return input;
  if (input.dim() == 2) return input.unsqueeze(1);
  return batch_first ? input.transpose(0, 1) : input;
}

Tensor from_time_major(const Tensor& output, bool packed, bool unbatched, bool batch_first) {
  if (packed) return output;
  if (unbatched) return output.squeeze(1);
  return batch_first ? output.transpose(0, 1) : output;
}

std::tuple<Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& hx,
                               at::TensorList weights, const OptionalTensor& batch_sizes,
                               std::string_view nonlinearity, bool bias, int64_t num_layers,
                               bool bidirectional, bool batch_first) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, at::TensorList,
                                               const OptionalTensor&, std::string_view, bool,
                                               int64_t, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::rnn", "").typed<Signature>();
  return op.call(input, hx, weights, batch_sizes, nonlinearity, bias, num_layers, bidirectional,
                 batch_first);
}

ForwardResult rnn_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                          const OptionalTensor& batch_sizes, const RnnOptions& options, bool keep) {
  using Signature =
      ForwardResult(const Tensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
                    std::string_view, bool, int64_t, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::rnn_forward", "").typed<Signature>();
  return op.call(input, hx, weights, batch_sizes, options.nonlinearity, options.bias,
                 options.num_layers, options.bidirectional, keep);
}

BackwardResult rnn_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                            const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                            const RnnOptions& options, const std::vector<bool>& needs) {
  using Signature =
      BackwardResult(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                     const OptionalTensor&, at::TensorList, const OptionalTensor&, at::TensorList,
                     std::string_view, bool, int64_t, bool, c10::List<bool>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastrnn::rnn_backward", "")
                             .typed<Signature>();
  c10::List<bool> needs_list;
  for (const bool need : needs) needs_list.push_back(need);
  return op.call(grad_output, grad_h_n, input, hx, weights, batch_sizes, layer_outputs,
                 options.nonlinearity, options.bias, options.num_layers, options.bidirectional,
                 needs_list);
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("check_arguments",
         [](const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
            const OptionalTensor& batch_sizes, std::string_view nonlinearity, bool bias,
            int64_t num_layers, bool bidirectional, bool batch_first) {
           check_arguments(input, hx, weights, batch_sizes,
                           {nonlinearity, bias, num_layers, bidirectional}, batch_first);
         });
}

}  // namespace fastrnn
