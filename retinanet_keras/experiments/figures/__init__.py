"""The paper's figures, each as a picture and the numbers behind it."""
