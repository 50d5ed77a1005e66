// SPDX-License-Identifier: Apache-2.0
//
// Argument checks, worded as nn.RNN words them. rnn_forward and rnn_backward call them once each,
// since each can be called by itself; nothing above or below checks again.
#include <c10/core/SymInt.h>
#include <torch/library.h>

#include <array>
#include <string>

#include "check_memory.h"
#include "layer.h"

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
                  const RnnOptions& options, const c10::SymInt& hidden_size, bool unbatched) {
  const std::array<c10::SymInt, 3> expected{options.num_layers * options.directions(), batch,
                                            hidden_size};
  auto sizes = hx.sym_sizes().vec();
  if (unbatched) sizes.insert(sizes.begin() + 1, 1);
  TORCH_CHECK(c10::SymIntArrayRef(sizes) == c10::SymIntArrayRef(expected), "Expected hidden size (",
              expected[0], ", ", batch, ", ", hidden_size, "), got ", c10::SymIntArrayRef(sizes),
              ". For this ", unbatched ? "unbatched " : "", "input hx must be ",
              hidden_layout(options, unbatched, batch, hidden_size),
              options.batch_first
                  ? ", also with batch_first=True, which applies to input and output only"
                  : "",
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

void check_is_batch_sizes(const Tensor& batch_sizes) {
  TORCH_CHECK_INDEX(batch_sizes.sym_numel() > 0,
                    "index 0 is out of bounds for dimension 0 with size 0: batch_sizes is empty");
  TORCH_CHECK(batch_sizes.scalar_type() == at::kLong, "expected scalar type Long but found ",
              c10::toString(batch_sizes.scalar_type()),
              ". batch_sizes must be torch.int64: use pack_padded_sequence or pack_sequence.");
  TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu(),
              "batch_sizes must be a 1-D CPU tensor, as pack_padded_sequence makes it");
}

/// The rows of each step, as they are now. Only this copy is checked and used: another thread may
/// write to batch_sizes at any time.
std::vector<int64_t> rows_of_steps(const Tensor& batch_sizes) {
  check_is_batch_sizes(batch_sizes);
  check_memory(batch_sizes, "batch_sizes");
  const int64_t* const from = batch_sizes.const_data_ptr<int64_t>();
  std::vector<int64_t> rows(batch_sizes.numel());
  for (size_t t = 0; t < rows.size(); ++t) rows[t] = from[t * batch_sizes.stride(0)];
  return rows;
}

void check_rows(const std::vector<int64_t>& rows_of_steps, const Tensor& input) {
  int64_t rows = 0, before = rows_of_steps[0];
  for (size_t t = 0; t < rows_of_steps.size(); ++t) {
    const int64_t n = rows_of_steps[t];
    TORCH_CHECK(n >= 0 && n <= before, "batch_sizes must not be negative and must not grow, got ",
                n, " at step ", t,
                ": sequences are sorted by decreasing length, as pack_padded_sequence does.");
    TORCH_CHECK(rows + n <= input.size(0), "start (", rows, ") + length (", n,
                ") exceeds dimension size (", input.size(0),
                "). The packed data has fewer rows than the sum of batch_sizes.");
    rows += n;
    before = n;
  }
  // nn.RNN ignores surplus rows in one direction and shifts the other by them: silent nonsense.
  TORCH_CHECK(rows == input.size(0), "the packed data has ", input.size(0),
              " rows, but batch_sizes add up to ", rows, ": drop the surplus rows.");
}

/// All but memory. `rows`: of each step of packed sequences; null while tracing, where batch_sizes
/// holds no numbers.
void check_sizes(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                 const OptionalTensor& batch_sizes, const RnnOptions& options,
                 const std::vector<int64_t>* rows) {
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

  if (packed) {
    check_is_batch_sizes(*batch_sizes);
  } else {
    TORCH_CHECK_VALUE(input.dim() == 2 || input.dim() == 3,
                      "RNN: Expected input to be 2D or 3D, got ", input.dim(),
                      "D tensor instead. Use (T, I) for one sequence, ",
                      options.batch_first ? "(B, T, I)" : "(T, B, I)", " for a batch.");
  }
  // While tracing, hx alone says how many sequences are packed; rnn_forward looks when it runs.
  const bool hx_tells = packed && rows == nullptr && hx.has_value() && hx->dim() > 1;
  const c10::SymInt batch = rows != nullptr ? c10::SymInt((*rows)[0])
                            : hx_tells      ? hx->sym_size(1)
                            : packed        ? c10::SymInt(0)
                            : unbatched     ? c10::SymInt(1)
                                            : input.sym_size(options.batch_first ? 0 : 1);
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
  if (rows != nullptr) check_rows(*rows, input);
  if (hx.has_value()) {
    check_hidden(*hx, input, batch, options, hidden_size, unbatched);
    TORCH_CHECK(hx->device() == input.device(),
                "Input and hidden tensors are not at the same device, found input tensor at ",
                input.device(), " and hidden tensor at ", hx->device(), ".");
  }
  check_weights(input, weights, options, hidden_size);
  TORCH_CHECK(packed || input.sym_size(unbatched || !options.batch_first ? 0 : 1) > 0,
              "Expected sequence length to be larger than 0 in RNN. Drop empty sequences.");
}

/// All that an engine relies on, but for memory.
Layout checked_layout(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const RnnOptions& options) {
  std::vector<int64_t> rows;
  if (batch_sizes.has_value()) rows = rows_of_steps(*batch_sizes);
  check_sizes(input, hx, weights, batch_sizes, options, batch_sizes.has_value() ? &rows : nullptr);
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_fused_dtype(input.scalar_type()), "fastrnn's operators are not implemented for ",
      c10::toString(input.scalar_type()),
      ": call fastrnn.RNN or fastrnn.functional.rnn, which take PyTorch's own path for it.");
  if (batch_sizes.has_value()) return Layout(std::move(rows));
  const bool unbatched = input.dim() == 2, batch_first = options.batch_first && !unbatched;
  return Layout(input.size(batch_first ? 1 : 0), unbatched ? 1 : input.size(batch_first ? 0 : 1));
}

}  // namespace

Cell cell_of(at::TensorList weights, const RnnOptions& options, int64_t layer, int64_t direction) {
  const auto* w = &weights[(layer * options.directions() + direction) * options.weights_per_cell()];
  return options.bias ? Cell{w[0], w[1], w[2], w[3]} : Cell{w[0], w[1], Tensor(), Tensor()};
}

void check_arguments(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                     const OptionalTensor& batch_sizes, const RnnOptions& options) {
  std::vector<int64_t> rows;
  const bool known = batch_sizes.has_value() && has_values(*batch_sizes);
  if (known) rows = rows_of_steps(*batch_sizes);
  check_sizes(input, hx, weights, batch_sizes, options, known ? &rows : nullptr);
}

Layout check_forward(const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                     const OptionalTensor& batch_sizes, const RnnOptions& options) {
  Layout layout = checked_layout(input, hx, weights, batch_sizes, options);
  check_input_memory(input);
  if (hx.has_value()) check_memory(*hx, "hx");
  for (size_t i = 0; i < weights.size(); ++i) check_memory(weights[i], "weight ", i);
  return layout;
}

Layout check_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                      const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
                      const OptionalTensor& batch_sizes, at::TensorList layer_outputs,
                      const RnnOptions& options, const c10::List<bool>& needs) {
  Layout layout = checked_layout(input, hx, weights, batch_sizes, options);
  const auto check = [&](const Tensor& t, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == input.scalar_type() &&
                    t.device() == input.device(),
                "fastrnn::rnn_backward: ", name, " must be ", sizes, ", ",
                dtype_name(input.scalar_type()), " on ", input.device(), ", got ", t.sizes(), ", ",
                dtype_name(t.scalar_type()), " on ", t.device());
  };
  TORCH_CHECK(static_cast<int64_t>(layer_outputs.size()) == options.num_layers &&
                  needs.size() == weights.size() + 2,
              "fastrnn::rnn_backward: one layer output for each layer and one need for input, hx "
              "and each weight are expected, got ",
              layer_outputs.size(), " and ", needs.size());
  const int64_t D = options.directions(), H = weights[1].size(0);
  const bool unbatched = !layout.packed() && input.dim() == 2;
  std::vector<int64_t> kept{layout.T, layout.B, D * H}, output = input.sizes().vec();
  if (layout.packed()) kept = {layout.total_rows, D * H};
  output.back() = D * H;
  std::vector<int64_t> states{options.num_layers * D, layout.B, H};
  if (unbatched) states = {options.num_layers * D, H};
  for (const Tensor& y : layer_outputs) check(y, kept, "a layer output");
  if (grad_output.has_value() && grad_output->defined()) {
    check(*grad_output, output, "grad_output");
    check_memory(*grad_output, "the gradient of the output");
  }
  if (grad_h_n.has_value() && grad_h_n->defined()) {
    check(*grad_h_n, states, "grad_h_n");
    check_memory(*grad_h_n, "the gradient of h_n");
  }

  check_memory_of_backward(input, hx, weights, layer_outputs, options, needs);
  return layout;
}

OptionalTensor copy_batch_sizes(const OptionalTensor& batch_sizes) {
  if (!batch_sizes.has_value()) return batch_sizes;
  check_is_batch_sizes(*batch_sizes);
  if (has_values(*batch_sizes)) check_memory(*batch_sizes, "batch_sizes");
  return batch_sizes->clone();
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("check_arguments",
         [](const Tensor& input, const OptionalTensor& hx, at::TensorList weights,
            const OptionalTensor& batch_sizes, std::string_view nonlinearity, bool bias,
            int64_t num_layers, bool bidirectional, bool batch_first) {
           check_arguments(input, hx, weights, batch_sizes,
                           {nonlinearity, bias, num_layers, bidirectional, batch_first});
         });
}

}  // namespace fastrnn
