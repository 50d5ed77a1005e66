// SPDX-License-Identifier: Apache-2.0
//
// The vanilla RNN primitive of oneDNN behind a C interface, for benchmarks only.
//
// onednn_rnn_make builds the primitives and keeps the caller's pointers; onednn_rnn_run is one
// call: inference, or forward and backward. All memory is the caller's, contiguous:
// x (T, B, I), y (T, B, D*H), states (L, D, B, H), w_ih (L, D, H, I), w_hh (L, D, H, H), bias (L,
// D, H). bias and gradients (names with d) are float32, all else float32 or bfloat16.

#include <omp.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <utility>
#include <vector>

using dnnl::memory;
using Tag = memory::format_tag;
using Type = memory::data_type;

struct Shape {
  int T, B, I, H, L, D, relu, bfloat16, training, threads;
};

struct Buffers {
  void *x, *w_ih, *w_hh, *bias, *y, *h_0, *h_n;
  void *dy, *dx, *dh_0, *dh_n, *dw_ih, *dw_hh, *db;
};

namespace {

class Rnn {
 public:
  Rnn(const Shape& shape, const Buffers& buffers)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    const memory::dim T = shape.T, B = shape.B, I = shape.I, H = shape.H, L = shape.L, D = shape.D;
    const Type type = shape.bfloat16 ? Type::bf16 : Type::f32;
    const auto activation =
        shape.relu ? dnnl::algorithm::eltwise_relu : dnnl::algorithm::eltwise_tanh;
    const auto direction = D == 2 ? dnnl::rnn_direction::bidirectional_concat
                                  : dnnl::rnn_direction::unidirectional_left2right;
    const memory::dims state_size{L, D, B, H}, w_ih_size{L, D, I, 1, H}, w_hh_size{L, D, H, 1, H};
    const memory::desc x({T, B, I}, type, Tag::tnc), y({T, B, D * H}, type, Tag::tnc);
    const memory::desc state(state_size, type, Tag::ldnc);
    const memory::desc bias({L, D, 1, H}, Type::f32, Tag::ldgo);
    const memory::desc any_w_ih(w_ih_size, type, Tag::any), any_w_hh(w_hh_size, type, Tag::any);
    // (L, D, 1, H, I): the layout of torch.nn.RNN.
    const memory w_ih({w_ih_size, type, Tag::ldgoi}, engine_, buffers.w_ih);
    const memory w_hh({w_hh_size, type, Tag::ldgoi}, engine_, buffers.w_hh);

    const auto kind =
        shape.training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const dnnl::vanilla_rnn_forward::primitive_desc forward(
        engine_, kind, activation, direction, x, state, any_w_ih, any_w_hh, bias, y, state);
    // With an implicit src_iter, version 3.2 computes a wrong gradient of w_hh.
    Arguments arguments{{DNNL_ARG_SRC_LAYER, {x, engine_, buffers.x}},
                        {DNNL_ARG_SRC_ITER, {state, engine_, buffers.h_0}},
                        {DNNL_ARG_BIAS, {bias, engine_, buffers.bias}},
                        {DNNL_ARG_DST_LAYER, {y, engine_, buffers.y}},
                        {DNNL_ARG_DST_ITER, {state, engine_, buffers.h_n}}};
    const bool each_call = shape.training;
    arguments[DNNL_ARG_WEIGHTS_LAYER] = packed(w_ih, forward.weights_layer_desc(), each_call);
    arguments[DNNL_ARG_WEIGHTS_ITER] = packed(w_hh, forward.weights_iter_desc(), each_call);
    if (!shape.training) {
      steps_.push_back({dnnl::vanilla_rnn_forward(forward), arguments});
      return;
    }
    arguments[DNNL_ARG_WORKSPACE] = memory(forward.workspace_desc(), engine_);
    steps_.push_back({dnnl::vanilla_rnn_forward(forward), arguments});

    const memory::desc dx({T, B, I}, Type::f32, Tag::tnc), dy({T, B, D * H}, Type::f32, Tag::tnc);
    const memory::desc dstate(state_size, Type::f32, Tag::ldnc);
    const memory::desc any_dw_ih(w_ih_size, Type::f32, Tag::any);
    const memory::desc any_dw_hh(w_hh_size, Type::f32, Tag::any);
    const dnnl::vanilla_rnn_backward::primitive_desc backward(
        engine_, dnnl::prop_kind::backward, activation, direction, x, state, any_w_ih, any_w_hh,
        bias, y, state, dx, dstate, any_dw_ih, any_dw_hh, bias, dy, dstate, forward);
    arguments[DNNL_ARG_WEIGHTS_LAYER] = packed(w_ih, backward.weights_layer_desc(), true);
    arguments[DNNL_ARG_WEIGHTS_ITER] = packed(w_hh, backward.weights_iter_desc(), true);
    const memory dw_ih({w_ih_size, Type::f32, Tag::ldgoi}, engine_, buffers.dw_ih);
    const memory dw_hh({w_hh_size, Type::f32, Tag::ldgoi}, engine_, buffers.dw_hh);
    const memory db(bias, engine_, buffers.db);
    const memory own_dw_ih = of_layout(dw_ih, backward.diff_weights_layer_desc());
    const memory own_dw_hh = of_layout(dw_hh, backward.diff_weights_iter_desc());
    arguments[DNNL_ARG_DIFF_SRC_LAYER] = memory(dx, engine_, buffers.dx);
    arguments[DNNL_ARG_DIFF_SRC_ITER] = memory(dstate, engine_, buffers.dh_0);
    arguments[DNNL_ARG_DIFF_DST_LAYER] = memory(dy, engine_, buffers.dy);
    arguments[DNNL_ARG_DIFF_DST_ITER] = memory(dstate, engine_, buffers.dh_n);
    arguments[DNNL_ARG_DIFF_WEIGHTS_LAYER] = own_dw_ih;
    arguments[DNNL_ARG_DIFF_WEIGHTS_ITER] = own_dw_hh;
    arguments[DNNL_ARG_DIFF_BIAS] = db;
    // The primitive adds to these.
    zeroed_ = {own_dw_ih, own_dw_hh, db};
    steps_.push_back({dnnl::vanilla_rnn_backward(backward), arguments});
    add_reorder(own_dw_ih, dw_ih);
    add_reorder(own_dw_hh, dw_hh);
  }

  void run() {
    for (const memory& each : zeroed_) {
      std::memset(each.get_data_handle(), 0, each.get_desc().get_size());
    }
    for (const auto& [primitive, arguments] : steps_) primitive.execute(stream_, arguments);
    stream_.wait();
  }

 private:
  using Arguments = std::unordered_map<int, memory>;

  // The same memory if it has this layout, else new one.
  memory of_layout(const memory& given, const memory::desc& layout) {
    return given.get_desc() == layout ? given : memory(layout, engine_);
  }

  void add_reorder(const memory& from, const memory& to) {
    if (from.get() == to.get()) return;
    steps_.push_back({dnnl::reorder(from, to), {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}}});
  }

  // `weights` in the layout that a primitive wants, brought there now or as a step of each call.
  memory packed(const memory& weights, const memory::desc& layout, bool each_call) {
    const memory own = of_layout(weights, layout);
    if (each_call) {
      add_reorder(weights, own);
    } else if (own.get() != weights.get()) {
      memory from = weights, to = own;
      dnnl::reorder(from, to).execute(stream_, from, to);
      stream_.wait();
    }
    return own;
  }

  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<memory> zeroed_;
  std::vector<std::pair<dnnl::primitive, Arguments>> steps_;
};

}  // namespace

extern "C" {

// Null after an error, with its text in `error`.
void* onednn_rnn_make(const Shape* shape, const Buffers* buffers, char* error, int error_size) {
  omp_set_num_threads(shape->threads);
  try {
    return new Rnn(*shape, *buffers);
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
    return nullptr;
  }
}

// 0, or 1 after an error.
int onednn_rnn_run(void* rnn) {
  try {
    static_cast<Rnn*>(rnn)->run();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

void onednn_rnn_free(void* rnn) { delete static_cast<Rnn*>(rnn); }
}
