# The defaults written out: a byte-level model that a laptop trains in minutes. All values are ours.
n_layer, n_head, n_embd = 4, 4, 128
vocab_size, block_size = 256, 256
dataset = "pysrc"
batch_tokens, micro_batch = 2048, 16
max_steps = 1000
lr, warmup_steps = 6e-3, 100
eval_interval, eval_tokens, save_interval = 250, 65536, 250
