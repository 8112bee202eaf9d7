// 2:4 for the tensor cores: from X[T, K] to the kept values, their metadata in the order that mma.sp or wgmma is loaded
// from, and each token's scale, in one pass.
//
// A block has 1024 channels of 32 tokens and 8 warps; warp w has the tokens w, w + 8, w + 16 and w + 24, because their
// metadata lie side by side. A lane takes 32 channels of its four tokens: 64 bytes of X in, 32 bytes of values and 16
// bytes of metadata out. What the token's scale is made of is left as moments of the block's channels.
//
// values   [padded, K / 2], the kept channels in their order. 1:4 fills up with a zero.
// metadata words of 32 bits. PTX wants the 2-bit places of 16 channels in 16 bits; of 32 channels a token t owns two
//          such halves, lo and hi. A word holds the lo, or the hi, of two tokens eight apart, t and t + 8.
//   MMA    [K / 32, padded]. With a = t % 8 and q = t / 8 of a token of its 32, row 4a + (q & ~1) holds the lo of the
//          tokens of q & ~1 and q | 1, and the row after it their hi. (CUTLASS: reorder_meta, for ldmatrix.)
//   WGMMA  blocks of 64 tokens x 128 channels, K / 128 rounded up by padded / 64; in a block [4 of 16 tokens][lo, hi]
//          [8 tokens][4 of 32 channels]. (CUTLASS: TensorEAtom of Sm90GemmSparseConfig.) Beyond K the places are 0, 1.
//
// padded is T up to the next 32, or 64 for WGMMA: the rows beyond T are packed as tokens of zeros.
#pragma once

#include "rank.h"

namespace nmsparse {

enum class MetadataOrder : int32_t { MMA, WGMMA };

constexpr int WGMMA_TOKENS = 64, WGMMA_CHANNELS = 128;  // of a block of metadata

template <class T>
struct Pack {
    static constexpr int THREADS = 256, PHASES = 3, TOKENS = 32, CHANNELS = 32, LANES = 32, ROWS = 4, EIGHTHS = 8;

    struct Args {
        T const* x;                  // [tokens, k]
        float const* channel_scale;  // [k] or null
        float const* shift;          // [k] or null
        float const* eta;            // [tokens] or null
        int32_t const* permutation;  // [k] or null: place -> channel; the rows of W are in the order of the places
        T* values;                   // [padded, k / 2]
        uint32_t* metadata;          // [k / 32, padded] words, k up to the next 128 for WGMMA
        Moments* z;                  // [padded, blocks_y] or null
        Moments* kept;               // likewise
        int tokens, padded, k, keep;
        MetadataOrder order;
    };

    struct alignas(16) Words {
        uint32_t at[4];
    };

    struct Shared {
        Moments z[TOKENS][LANES], kept[TOKENS][LANES];
    };

    static int blocks_x(Args const& args) { return args.padded / TOKENS; }
    NMSPARSE_DEVICE static int parts(int k) { return (k + LANES * CHANNELS - 1) / (LANES * CHANNELS); }
    NMSPARSE_DEVICE static int blocks_y(Args const& args) { return parts(args.k); }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        if constexpr (PHASE == 0)
            pack(args, shared, place);
        else if (args.z != nullptr)
            merge<PHASE>(args, shared, place);
    }

    NMSPARSE_DEVICE static void pack(Args const& args, Shared& shared, Place place) {
        int const warp = place.thread / LANES, lane = place.thread % LANES, first = place.block_x * TOKENS;
        int const chunk = place.block_y * LANES + lane;
        if (chunk < args.k / CHANNELS) {
            uint32_t halves[ROWS][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int const channel = chunk * CHANNELS + 16 * half;
                float scale[16], z[16], kept[16];
                load_scale(args, channel, scale);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    int const token = first + warp + 8 * row;
                    Eight<T> out;
                    load(args, token, channel, z);
                    halves[row][half] = select(args, scale, z, kept, out);
                    *reinterpret_cast<Eight<T>*>(args.values + (int64_t(token) * args.k + channel) / 2) = out;
                    if (args.z == nullptr) continue;
                    Moments &of_z = shared.z[warp + 8 * row][lane], &of_kept = shared.kept[warp + 8 * row][lane];
                    if (half == 0) of_z = of_kept = {};
                    of_z.add(Moments::of(z));
                    of_kept.add(Moments::of(kept));
                }
            }
            store(args, place, chunk, {{halves[0][0] | halves[1][0] << 16, halves[0][1] | halves[1][1] << 16,
                                        halves[2][0] | halves[3][0] << 16, halves[2][1] | halves[3][1] << 16}});
            return;
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) shared.z[warp + 8 * row][lane] = shared.kept[warp + 8 * row][lane] = {};
        int const end = (args.k + WGMMA_CHANNELS - 1) / WGMMA_CHANNELS * WGMMA_CHANNELS;
        if (args.order == MetadataOrder::WGMMA && chunk * CHANNELS < end)
            store(args, place, chunk, {{0x44444444, 0x44444444, 0x44444444, 0x44444444}});
    }

    // Of a warp's rows, the lo and hi of 0 and 1, and of 2 and 3. In both orders the warps of a block fill 128 bytes.
    NMSPARSE_DEVICE static void store(Args const& args, Place place, int chunk, Words const& words) {
        int const warp = place.thread / LANES, first = place.block_x * TOKENS;
        if (args.order == MetadataOrder::MMA) {
            *reinterpret_cast<Words*>(args.metadata + int64_t(chunk) * args.padded + first + 4 * warp) = words;
        } else {
            // 256 words for 64 tokens: four a token, so a block of 32 tokens is at four times its first one.
            uint32_t* to = args.metadata + (int64_t(chunk / 4) * args.padded + first + warp) * 4 + chunk % 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[32 * i] = words.at[i];
        }
    }

    // z of 16 channels from `place` on; of a row beyond the last token, zeros.
    NMSPARSE_DEVICE static void load(Args const& args, int token, int place, float (&z)[16]) {
        if (token >= args.tokens) {
#pragma unroll
            for (int i = 0; i < 16; ++i) z[i] = 0;
            return;
        }
        T const* row = args.x + int64_t(token) * args.k;
        if (args.permutation != nullptr) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                Channel const channel = channel_at(args, place + i);
                z[i] = channel.of(widen(row[channel.at]));
            }
        } else {
            auto const* from = reinterpret_cast<Eight<T> const*>(row + place);
#pragma unroll
            for (int i = 0; i < 16; i += 8) {
                Eight<T> const eight = from[i / 8];
#pragma unroll
                for (int j = 0; j < 8; ++j) z[i + j] = widen(eight.at[j]);
            }
        }
        if (args.eta != nullptr)
#pragma unroll
            for (int i = 0; i < 16; ++i) z[i] -= args.eta[token];
        else if (args.shift != nullptr)
#pragma unroll
            for (int i = 0; i < 16; ++i) z[i] -= args.shift[channel_at(args, place + i).at];
    }

    // By fours: a load for each channel, 128 bytes apart over the lanes, takes longer than all else.
    NMSPARSE_DEVICE static void load_scale(Args const& args, int place, float (&scale)[16]) {
        struct alignas(16) Four {
            float at[4];
        };
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            Four four{{1, 1, 1, 1}};
            if (args.channel_scale != nullptr && args.permutation == nullptr)
                four = *reinterpret_cast<Four const*>(args.channel_scale + place + i);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                scale[i + j] = args.channel_scale != nullptr && args.permutation != nullptr
                                   ? args.channel_scale[channel_at(args, place + i + j).at]
                                   : four.at[j];
        }
    }

    // Of 16 channels: the kept ones as numbers beside zeros, packed, and their places in 16 bits.
    NMSPARSE_DEVICE static uint32_t select(Args const& args, float const* scale, float const* z, float* kept, Eight<T>& out) {
        uint32_t metadata = 0;
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            float const* of = z + 4 * group;
            float scores[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                scores[i] = score(of[i], scale[4 * group + i]);
            bool keep[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int rank = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) rank += j != i && before(scores[j], j, scores[i], i);
                keep[i] = rank < args.keep;
                kept[4 * group + i] = keep[i] ? of[i] : 0;
            }
            // The first kept place is 0 to 2, the last 1 to 3: with one kept, a dropped one beside it is sent as zero.
            int const low = keep[0] ? 0 : keep[1] ? 1 : 2, high = keep[3] ? 3 : keep[2] ? 2 : 1;
            int const second = high > low ? high : low + 1;
            float lowest = 0, highest = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                lowest = i == low ? kept[4 * group + i] : lowest;
                highest = i == second ? kept[4 * group + i] : highest;
            }
            narrow(lowest, out.at[2 * group]);
            narrow(highest, out.at[2 * group + 1]);
            metadata |= uint32_t(low | second << 2) << 4 * group;
        }
        return metadata;
    }

    // Of each token's 32 moments eight, and of these one; always in the same order.
    template <int PHASE>
    NMSPARSE_DEVICE static void merge(Args const& args, Shared& shared, Place place) {
        int const token = PHASE == 1 ? place.thread / EIGHTHS : place.thread, part = PHASE == 1 ? place.thread % EIGHTHS : 0;
        if (token >= TOKENS) return;
        constexpr int STRIDE = PHASE == 1 ? EIGHTHS : 1, COUNT = PHASE == 1 ? LANES / EIGHTHS : EIGHTHS;
        Moments z = shared.z[token][part], kept = shared.kept[token][part];
        for (int i = 1; i < COUNT; ++i) {
            z.add(shared.z[token][part + i * STRIDE]);
            kept.add(shared.kept[token][part + i * STRIDE]);
        }
        if (PHASE == 1) {
            shared.z[token][part] = z;
            shared.kept[token][part] = kept;
        } else {
            int64_t const at = int64_t(place.block_x * TOKENS + token) * blocks_y(args) + place.block_y;
            args.z[at] = z;
            args.kept[at] = kept;
        }
    }
};

}  // namespace nmsparse
