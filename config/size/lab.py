# The size at which the suites of ablate.py run: 270,816 parameters, 20 tokens per parameter, some
# four minutes per run on a core. All values are ours.
n_layer, n_head, n_embd = 2, 3, 96
vocab_size, block_size = 256, 128
dataset = "pysrc"
batch_tokens, micro_batch = 2048, 16
max_steps = 20 * 270_816 // batch_tokens  # 20 tokens per parameter of the baseline
lr, warmup_steps = 8e-3, 100
eval_interval, eval_tokens, save_interval = 1322, 0, 1322  # half way and at the end, on all of the validation split
