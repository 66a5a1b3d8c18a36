"""Operations on several tensors that sum no products, and whose labels all stay, because they have no rule."""

from __future__ import annotations

from autoprune.structure.rules.registry import known

known("_grid_sampler_2d_cpu_fallback", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", free=True)
known("normal", "linalg_cross", "polar", "complex", "segment_reduce", free=True)
known("masked_scatter", "masked_scatter_", "take", "put", "put_", free=True)
known("mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss", "multi_margin_loss", "_ctc_loss", free=True)
known("binary_cross_entropy", "binary_cross_entropy_with_logits", "nll_loss_forward", "nll_loss2d_forward", free=True)
known("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", free=True)
known("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", free=True)
known("_fused_moving_avg_obs_fq_helper", free=True)
known("_native_batch_norm_legit", free=True, statistics=True)
known("_batch_norm_with_update", "_batch_norm_no_update", statistics=True)
