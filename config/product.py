# A rival of OR: γ = β α, without a norm.
reparam = "product"
