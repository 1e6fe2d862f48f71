"""WMDP, MMLU and files of the same fields."""
