"""Train with Transformers' `Trainer`: `python training/train_with_trainer.py --dataset data --output_dir OUT`."""

from nanovlm_hf.training.with_trainer import main

if __name__ == "__main__":
    main()
