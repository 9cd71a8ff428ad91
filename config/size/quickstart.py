# The defaults written out: a byte-level model that a laptop trains in minutes. All values are ours.
n_layer, n_head, n_embd = 4, 4, 128
vocab_size, block_size = 256, 256
dataset = "pysrc"
batch_tokens, micro_batch = 4096, 16
max_steps = 700
lr, warmup_steps = 2e-3, 50
eval_interval, eval_tokens, save_interval = 100, 131072, 100
