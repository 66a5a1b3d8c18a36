// A page that a server keeps up to date: it asks for the data again, and shows the state of the search.

const SECONDS = 1.5;
const MOST_SECONDS = 10;

/** Ask `url` for new data until the search has ended; `take` gets the parts. */
export function watch(url, take) {
  const state = document.getElementById("state");
  let version = "";
  let wait = SECONDS;
  const show = (text, kind) => {
    state.hidden = false;
    if (state.textContent !== text) state.textContent = text;
    state.dataset.kind = kind;
  };

  async function ask() {
    try {
      const answer = await fetch(url, { cache: "no-store", headers: { "If-None-Match": version } });
      if (answer.status === 200) {
        version = answer.headers.get("ETag") ?? "";
        await take(await answer.json());
      } else if (answer.status !== 304) throw new Error(`${answer.status}`);
      show(decodeURIComponent(answer.headers.get("X-State") ?? ""), answer.headers.get("X-Kind") ?? "running");
      wait = answer.headers.get("X-Kind") === "ended" ? MOST_SECONDS : SECONDS;
    } catch {
      show("The server does not answer; it may have been ended. The page shows the last state.", "lost");
      wait = Math.min(MOST_SECONDS, 2 * wait);
    }
    setTimeout(ask, 1000 * wait);
  }
  ask();
}
