// What decode_attention.cpp and its kernel agree on; knows nothing of torch.
#pragma once

#include <cstdint>

#include "attention.h"

namespace beit3_fast {

// A call of the op. Rows are dense: qkv is (slots * tokens, 3, heads, head_dim), prefix (rows, 2, heads, head_dim),
// words (places, slots, 2, heads, head_dim), history (places, slots), out (slots * tokens, heads, head_dim). A sample's
// beams are its `beams` consecutive slots.
struct DecodeCall {
  const AttentionSample* samples;
  int64_t batch, heads, head_dim;
  int64_t beams, tokens;  // of a sample, new ones of a beam
  int64_t length;         // words of a beam
  int64_t slots;
  int64_t longest;  // rows of the longest prefix
  float scale;
  const void* qkv;
  const void* prefix;
  const void* words;
  const int32_t* history;
  void* out;

  int64_t own() const { return length + tokens; }  // keys that only one beam sees
};

}  // namespace beit3_fast
