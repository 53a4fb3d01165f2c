// The ops' C++ functions, one file each family, registered in library.cpp.
#pragma once

#include <string>
#include <vector>

#include "ops/stable_abi.h"

namespace kvkernels {

void swap_blocks(const Tensor& src, const Tensor& dst, int64_t block_size_in_bytes, const Tensor& block_mapping,
                 StrArgument executor, int64_t sm_budget);
void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                       bool is_src_access_order_any, StrArgument executor, int64_t sm_budget);

void gather_blocks(const std::vector<Tensor>& pools, const Tensor& block_ids, const Tensor& out, StrArgument executor,
                   int64_t sm_budget);
void scatter_blocks(const Tensor& buffer, const Tensor& block_ids, const std::vector<Tensor>& pools,
                    StrArgument executor, int64_t sm_budget);

void copy_pages(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& mapping,
                const Tensor& runs, int64_t src_subblocks_per_block, int64_t dst_subblocks_per_block,
                bool skip_negative, StrArgument executor, int64_t sm_budget);

int64_t prepare(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& runs,
                int64_t src_subblocks_per_block, int64_t dst_subblocks_per_block, bool skip_negative,
                StrArgument executor, int64_t sm_budget);
void run_prepared(int64_t prepared, const Tensor& mapping);
void release_prepared(int64_t prepared);

Tensor concat_tp_shards(const std::vector<Tensor>& shards, int64_t dim, StrArgument executor, int64_t sm_budget);
void concat_tp_shards_out(const std::vector<Tensor>& shards, int64_t dim, const Tensor& out, StrArgument executor,
                          int64_t sm_budget);
void split_tp_shards(const Tensor& input, int64_t dim, const std::vector<Tensor>& out, StrArgument executor,
                     int64_t sm_budget);

void explain_begin();
std::string explain_end();
std::string build_info();
std::string check_device(int64_t device);

}  // namespace kvkernels
