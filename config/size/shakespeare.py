# nanoGPT's recipe for tiny Shakespeare on a CPU, as the outside yardstick: its shape, batches, steps and rates. nanoGPT
# reports a validation loss of 1.88. First run: python data/shakespeare/prepare.py
n_layer, n_head, n_embd = 4, 4, 128
vocab_size, block_size = 256, 64
dataset = "shakespeare"
batch_tokens, micro_batch = 12 * 64, 12
max_steps = 2000
lr, min_lr_frac, warmup_steps = 1e-3, 0.1, 100  # to 1e-4, by a cosine
beta2 = 0.99
eval_interval, eval_tokens, save_interval = 250, 0, 250
