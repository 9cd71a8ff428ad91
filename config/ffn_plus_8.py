# The paper's Llama-large: the baseline with an FFN 8 channels wider, and so more parameters than unified (at 0.12B
# 110,592 more than the baseline, where unified has 102,559). Figure 10.
ffn_extra = 8
