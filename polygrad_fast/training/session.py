"""One call of `learn`: the loop of Algorithm 3 with all that a user sees of it."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterator

from polygrad_fast.diagnostics.gradient import policy_gradient_report
from polygrad_fast.diagnostics.simulator import check_determined
from polygrad_fast.errors import NonFiniteError
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.profiling import annotate
from polygrad_fast.runs.interrupts import stop_on_signals
from polygrad_fast.runs.run import Run
from polygrad_fast.threads import cpu_threads
from polygrad_fast.training.estimate import Speed, TimeLeft, remaining_counts, time_left
from polygrad_fast.training.imagination import ImaginationTraining

DAY = 86400
CPU_PRESETS = ("quick", "laptop")


class Session:
    """Steps of a training with evaluations, rows of metrics, checkpoints and a progress bar.

    Args:
        training: what takes the steps.
        run: where rows and checkpoints go.
        evaluator: plays the evaluations.
        tell: hears every row of metrics; returning False ends the session.
        progress_bar: show one.
    """

    def __init__(
        self,
        training: ImaginationTraining,
        run: Run,
        evaluator: Evaluator,
        tell: Callable[[dict[str, float]], object],
        progress_bar: bool,
    ):
        self.training, self.run, self.evaluator = training, run, evaluator
        self._tell_user, self._shows_bar = tell, progress_bar
        self._estimated = False
        training.speed = Speed(training.num_timesteps)

    def train(self) -> None:
        """Train until the training's target, or until told to stop.

        Raises:
            InputError, NonFiniteError, OSError: as `PolyGRAD.learn`, naming step and checkpoint.
            KeyboardInterrupt: Ctrl-C came; the state is saved.
        """
        config, device = self.training.config, self.training.actor.device
        with contextlib.ExitStack() as stack:
            stack.enter_context(cpu_threads(config.cpu_threads, device))
            if config.gradient_trajectories:
                self._simulated = self.evaluator.environments.make()
                check_determined(self._simulated)
            stack.enter_context(self.run.locked())
            in_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            signals = [signal.SIGINT] if in_python else []
            interrupts = stack.enter_context(stop_on_signals(self._stop, signals))
            try:
                with self._opened():
                    self._take_steps()
            except BaseException as error:
                self._save_before(error)
                explained = self._explained(error)
                if explained is error:
                    raise
                raise explained from error
            if interrupts:
                raise self._explained(KeyboardInterrupt())

    def _stop(self) -> None:
        self.training.stop_requested = True

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        training = self.training
        with contextlib.ExitStack() as stack:
            logs = self.run.open_logs(training.num_timesteps)
            self._sinks = [stack.enter_context(log) for log in logs]
            self._bar = stack.enter_context(
                _progress_bar(training.num_timesteps, training.target_timesteps, self._shows_bar)
            )
            yield

    def _take_steps(self) -> None:
        training = self.training
        unsaved = False
        if training.num_timesteps == 0:
            metrics = self._evaluate(0)
            self._write(0, metrics)
            self._tell(metrics)
        while training.updates_left is not None or (
            training.num_timesteps < training.target_timesteps
            and not training.ranks.any(training.stop_requested)
        ):
            unsaved = True
            if not training.step():
                break
            step = training.following_step
            metrics = self._due_metrics(step)
            if metrics:
                self._write(step, metrics)
                training.clear_metrics()
            training.count_step()
            self._bar.update(training.ranks.number)
            if metrics:
                self._tell(metrics)
            if not self._estimated and step > training.config.learning_starts:
                self._estimate()
            if step % training.config.checkpoint_interval == 0:
                self._save()
                unsaved = False
        if unsaved:
            self._save()

    def _due_metrics(self, step: int) -> dict[str, float]:
        """Return the row of metrics due at a step, or nothing."""
        c, training = self.training.config, self.training
        last = step == training.target_timesteps
        metrics: dict[str, float] = {}
        if last or (step > c.learning_starts and step % c.eval_interval == 0):
            metrics = self._evaluate(step)
        if metrics or step % c.log_interval == 0 or last:
            training.check_finite()
            metrics |= training.metrics() | training.speed.read(step)
        return metrics

    def _evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the policy as of an environment step and keep it if none was better."""
        self.training.check_finite()
        with self.training.speed.measured("evaluation"):
            episodes = self.training.config.eval_episodes
            result = self.training.ranks.first(lambda: self.evaluator.evaluate(episodes))
            row = self.evaluator.note(result, lambda: self._save_best(step))
            return self._compare_gradients() | row

    def _save_best(self, step: int) -> None:
        with annotate("checkpoint"):
            self.run.save_best(step, self.training.weights())

    def _compare_gradients(self) -> dict[str, float]:
        """Return what the simulator says of the imagined policy gradient, if that is asked for and
        there are trajectories to start from."""
        training, num = self.training, self.training.config.gradient_trajectories
        if num == 0 or training.replay.num_windows == 0:
            return {}
        report = policy_gradient_report(
            self._simulated,
            training.world_model,
            training.learner,
            training.replay,
            training.action_scaler,
            num,
            batch_size=training.config.imagined_batch_size,
        )
        found = {
            "gradient/cosine": report.newest.cosine,
            "gradient/cosine_ceiling": report.newest.ceiling,
            "gradient/cosine_lambda_0": report.newest_lambda_0.cosine,
            "gradient/cosine_all_starts": report.all.cosine,
            "gradient/r2": report.on_policy.r2,
            "gradient/one_step_error": report.error.rms,
            "gradient/missed_terminals": report.error.missed_terminals,
            "gradient/false_terminals": report.error.false_terminals,
            "gradient/critic_value": report.critic.value,
            "gradient/critic_return": report.critic.discounted_return,
            "gradient/critic_correlation": report.critic.correlation,
            "gradient/critic_imagined_return": report.critic.imagined_return,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        left = self._time_left(step) if self._estimated else None
        self._bar.set_postfix_str(self._postfix(metrics, left))
        for sink in self._sinks:
            sink.write(step, metrics)

    def _tell(self, metrics: dict[str, float]) -> None:
        if self._tell_user(metrics) is False:
            self._stop()

    def _save(self) -> None:
        training = self.training
        if training.ranks.any(self.run.directory is not None):  # that of the first process
            training.check_finite()
            with annotate("checkpoint"):
                state = training.state_dict() | self.evaluator.state_dict()
                self.run.save(training.num_timesteps, training.weights(), state)

    def _save_before(self, error: BaseException) -> None:
        """Save the state before an error ends the training, if it is one to continue from."""
        training = self.training
        training.collector.keep()  # the error may have left the environments anywhere
        at_once = isinstance(error, KeyboardInterrupt) and training.stop_requested
        alone = training.ranks.number == 1  # what others hold cannot be asked for after an error
        if alone and training.consistent and training.num_timesteps > 0 and not at_once:
            # where saving itself fails, the last checkpoint is an older one
            with contextlib.suppress(OSError, NonFiniteError):
                self._save()

    def _explained(self, error: BaseException) -> BaseException:
        """Return an error with the step and the last checkpoint in it, or in its notes."""
        begun = self.training.updates_left is not None
        step = self.training.following_step if begun else self.training.num_timesteps
        return self.run.placed(error, f"training stopped at environment step {step}")

    def _time_left(self, step: int) -> TimeLeft:
        training = self.training
        counts = remaining_counts(training.config, step, training.target_timesteps)
        return time_left(training.speed.typical(), counts)

    def _estimate(self) -> None:
        """Show how long the rest takes as soon as that is known, and warn if it is long."""
        training, device = self.training, self.training.actor.device
        left = self._time_left(training.num_timesteps)
        is_long = left.seconds > DAY
        if not left.measured and not is_long:
            return
        if is_long:
            self._bar.clear()  # the warning gets a line of its own
            advice = "fewer environment steps or a smaller imagined_batch_size shorten the run"
            if device.type == "cpu" and self.run.identity["preset"] not in CPU_PRESETS:
                advice = f"the presets {' and '.join(map(repr, CPU_PRESETS))} are made for a CPU"
            warnings.warn(
                f"at the speed measured so far, the remaining "
                f"{training.target_timesteps - training.num_timesteps:,} environment steps take "
                f"{left} on {device.type!r}; {advice}",
                stacklevel=5,  # the caller of `learn`
            )
        self._bar.set_postfix_str(self._postfix({}, left))
        self._estimated = True

    def _postfix(self, metrics: dict[str, float], left: TimeLeft | None) -> str:
        """Return the words behind the progress bar."""
        words = {
            "time/env_steps_per_s": "{:.0f} env steps/s",
            "time/updates_per_s": "{:.0f} updates/s",
            "time/sample_ms": "{:.1f} ms/sample",
        }
        shown = [text.format(metrics[name]) for name, text in words.items() if name in metrics]
        if self.evaluator.best_mean_reward is not None:
            shown.append(f"best return {self.evaluator.best_mean_reward:.0f}")
        if left is not None:
            shown.append(f"{left} left")
        return ", ".join(shown)


def _progress_bar(start: int, target: int, enabled: bool):
    from tqdm import tqdm

    # without tqdm's own estimate: it takes the prefill's speed for that of the training
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    return tqdm(
        total=target,
        initial=start,
        disable=not enabled,
        unit="step",
        dynamic_ncols=True,
        bar_format=layout,
    )
