"""The algebra: tensors and numbers in and out. No files, clocks, logs or hidden randomness.

What is computed is the paper's equation 2, M = alpha * sum_i p_i Delta_i, with Delta_i = s_i B_i A_i.
"""
