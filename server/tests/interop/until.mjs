const EVERY_MS = 5;

/** Waits for `condition` to hold. `what` names it, as text or as a function that is asked when time is up. */
export async function until(condition, what, withinMs = 15_000) {
  const deadline = performance.now() + withinMs;
  while (!(await condition())) {
    if (performance.now() > deadline)
      throw new Error(`waited ${withinMs} ms in vain for ${typeof what === "function" ? what() : what}`);
    await new Promise(resolve => setTimeout(resolve, EVERY_MS));
  }
}
