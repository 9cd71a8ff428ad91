# The quickstart's 852,608 parameters with 20 tokens for each, for the arms that matter: some 20 minutes on a core.
# All values are ours.
n_layer, n_head, n_embd = 4, 4, 128
vocab_size, block_size = 256, 128
dataset = "pysrc"
batch_tokens, micro_batch = 2048, 16
max_steps = 20 * 852_608 // batch_tokens  # 20 tokens for each parameter of the baseline
lr, warmup_steps = 4e-3, 100
eval_interval, eval_tokens, save_interval = 1000, 262144, 1000
