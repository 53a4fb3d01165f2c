"""What every floor above uses, and what uses none of them: arguments, versions for autograd, text in tensors."""
