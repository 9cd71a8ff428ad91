# unified without DNP's norms: HG + DP + OR + IWD. Ours. All of it folds into the cast of the weights, so that it costs
# almost nothing, and the model exports as a plain Llama.
heterogeneous = True
placement = "dual"
reparam = "or"
scale_decay = "input"
