"""Stable-Baselines3: a callback, because a loaded agent has other optimizers; the histories are in the saved agent."""

import gymnasium
import numpy as np
from autoclip_torch.stable_baselines3 import AutoClipCallback
from checks import PERCENTILE, Trained, refused
from harness import play, watch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import Logger


class Target(gymnasium.Env):
    """Move a point to the middle; of the kinds of actions that the agents take."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float32)

    def __init__(self, *, discrete):
        actions = gymnasium.spaces.Discrete(3) if discrete else gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space, self.discrete = actions, discrete

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.normal(size=2).astype(np.float32), 0
        return self.at, {}

    def step(self, action):
        self.at = self.at + np.float32(action - 1.0 if self.discrete else action[0])
        self.steps += 1
        return self.at.clip(-10, 10), -float(np.square(self.at).sum()), False, self.steps == 20, {}


UNCLIPPED = {"max_grad_norm": float("inf")}


def train_with(kind, updates_of=lambda count: count, **options):
    """`updates_of` all optimizers by the agent's count."""
    discrete = kind not in {SAC, TD3}

    def train(folder, *, resume):
        if resume:
            model = kind.load(folder / "agent.zip", env=Target(discrete=discrete))
        else:
            model = kind("MlpPolicy", Target(discrete=discrete), seed=0, device="cpu", **options)
        before = model._n_updates
        model.set_logger(Logger(folder=None, output_formats=[]))
        # page
        callback = AutoClipCallback(PERCENTILE)
        model.learn(64, callback=[callback, CheckpointCallback(64, folder)], reset_num_timesteps=False)
        # end of page
        if not resume:
            model.save(folder / "agent.zip")
            watch.mark()
            model.learn(64, callback=callback, reset_num_timesteps=False)
        logged = callback.logger.name_to_value
        name = next(iter(callback.clips))
        ending = f"/{name}" if len(callback.clips) > 1 else ""
        numbers = {key: logged[f"train/{key}{ending}"] for key in ("grad_norm", "clip_threshold", "clipped")}
        return Trained(updates_of(model._n_updates) - updates_of(before), list(model.policy.parameters()), numbers)

    return train


def check_habits():
    """What goes wrong is said, and nothing stays behind."""
    model = PPO("MlpPolicy", Target(discrete=True), n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    with refused("max_grad_norm=0.5"):
        model.learn(32, callback=AutoClipCallback())
    model.max_grad_norm = float("inf")
    callback = AutoClipCallback()
    with refused("see `clips`"):
        callback.clip  # noqa: B018 - to see it refused
    model.learn(32, callback=callback)
    assert callback.clip.steps == 1
    model.learn(32)  # without the callback nothing is clipped
    assert callback.clip.steps == 1
    model.learn(32, callback=callback)
    assert callback.clip.steps == 2
    watch.take()


if __name__ == "__main__":
    ppo = train_with(PPO, lambda epochs: 2 * epochs, n_steps=32, batch_size=16, n_epochs=2, **UNCLIPPED)
    play("stable-baselines3", ppo, "PPO", replays=False)
    play("stable-baselines3", train_with(A2C, n_steps=8, **UNCLIPPED), "A2C", replays=False)
    play("stable-baselines3", train_with(DQN, learning_starts=16, **UNCLIPPED), "DQN", replays=False)
    # Actor, critic and entropy; and an actor that is updated every second time.
    play("stable-baselines3", train_with(SAC, lambda count: 3 * count, learning_starts=16), "SAC", replays=False)
    td3 = train_with(TD3, lambda count: count + count // 2, learning_starts=16)
    play("stable-baselines3", td3, "TD3", replays=False)
    check_habits()
