# unified with weight decay on OR's α too: the paper does not say whether IWD means β only or both [R].
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"
decay_direction = True
