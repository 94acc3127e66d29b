/**
 * A real browser for the tests of pages: headless Chromium, driven through its DevTools protocol.
 * It has a profile of its own, and whatever it asks of the network is told.
 */
import { type TempDir, tempDir } from "./fakes.ts";

/** The browser's path; null where it is not installed. */
const chromium: string | null = Bun.which("chromium");

/** How a page is looked at. */
export interface Look {
  width: number;
  height: number;
  dark?: boolean;
  /** A phone: touch, two and more device pixels for one. */
  phone?: boolean;
  /** As it is printed. */
  print?: boolean;
  /** Scripts are off, as where somebody distrusts the file. */
  withoutScripts?: boolean;
}

/** What a page did while it was loaded. */
export interface Loaded {
  /** Uncaught errors, console errors, violations of the page's policy, and dialogs. */
  problems: string[];
  /** Every URL asked for, the page's own left out. */
  requests: string[];
  /** The value of an expression in the page. */
  evaluate: <T>(expression: string) => Promise<T>;
  /** Looks at it otherwise, and waits until it was painted anew. */
  change: (look: Look) => Promise<void>;
  /** Presses a key. */
  press: (key: "Enter" | "Escape" | "/") => Promise<void>;
  /** A PNG of the window, or of the whole page. */
  screenshot: (whole?: boolean) => Promise<Uint8Array>;
}

/** A running browser. Close it. */
export interface Browser {
  /** Opens a page, calls `fn` once it is loaded, and closes it. */
  open: <T>(url: string, look: Look, fn: (page: Loaded) => Promise<T>) => Promise<T>;
  close: () => Promise<void>;
}

type Message = {
  id?: number;
  sessionId?: string;
  method?: string;
  params?: Record<string, unknown>;
  result?: Record<string, unknown>;
  error?: { message: string };
};
type Send = (method: string, params?: object, sessionId?: string) => Promise<Message["result"]>;

const flags = [
  ...["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
  ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
  ...["--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0"],
];

/** Starts the browser. */
export async function startBrowser(): Promise<Browser> {
  const profile = tempDir();
  const child = Bun.spawn(
    [chromium ?? "", ...flags, `--user-data-dir=${profile.path}`, "about:blank"],
    { stdin: "ignore", stdout: "ignore", stderr: "pipe", env: { HOME: profile.path } },
  );
  const socket = new WebSocket(await readAddress(child.stderr));
  const { promise: opened, resolve, reject } = Promise.withResolvers<void>();
  socket.onopen = () => resolve();
  socket.onerror = () => reject(new Error("Cannot connect to Chromium"));
  await opened;
  return browserOf(socket, async () => {
    socket.close();
    child.kill();
    await child.exited;
    removeProfile(profile);
  });
}

/** Children of the browser may still write into its profile for a moment. */
function removeProfile(profile: TempDir): void {
  for (let tries = 0; ; tries++) {
    try {
      profile[Symbol.dispose]();
      return;
    } catch (error) {
      if (tries === 1000) throw error;
      Bun.sleepSync(20);
    }
  }
}

async function readAddress(stderr: ReadableStream<Uint8Array>): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  const reader = stderr.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    text += decoder.decode(value, { stream: true });
    const [, address] = /DevTools listening on (ws:\S+)/.exec(text) ?? [];
    if (address !== undefined) {
      drain(reader);
      return address;
    }
    if (done) throw new Error(`Chromium did not start: ${text.slice(-2000)}`);
  }
}

async function drain(reader: { read: () => Promise<{ done: boolean }> }): Promise<void> {
  while (!(await reader.read()).done);
}

function browserOf(socket: WebSocket, close: () => Promise<void>): Browser {
  const waiting = new Map<number, (message: Message) => void>();
  const listeners = new Set<(message: Message) => void>();
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(String(data)) as Message;
    if (message.id === undefined) for (const listener of listeners) listener(message);
    else waiting.get(message.id)?.(message);
  };
  let last = 0;
  const send: Send = (method, params = {}, sessionId) => {
    const id = ++last;
    const { promise, resolve, reject } = Promise.withResolvers<Message["result"]>();
    waiting.set(id, ({ result, error }) => {
      waiting.delete(id);
      if (error) reject(new Error(`${method}: ${error.message}`));
      else resolve(result);
    });
    socket.send(JSON.stringify({ id, method, params, ...(sessionId && { sessionId }) }));
    return promise;
  };
  return {
    close,
    open: async (url, look, fn) => {
      const { targetId } = (await send("Target.createTarget", { url: "about:blank" })) ?? {};
      const attached = await send("Target.attachToTarget", { targetId, flatten: true });
      const sessionId = String(attached?.["sessionId"]);
      const seen: Message[] = [];
      const { promise: loaded, resolve } = Promise.withResolvers<void>();
      const listener = (message: Message) => {
        if (message.sessionId !== sessionId) return;
        seen.push(message);
        if (message.method === "Page.loadEventFired") resolve();
        if (message.method !== "Page.javascriptDialogOpening") return;
        void send("Page.handleJavaScriptDialog", { accept: true }, sessionId);
      };
      listeners.add(listener);
      try {
        const own: Send = (method, params) => send(method, params, sessionId);
        await prepare(own, look);
        await own("Page.navigate", { url });
        await loaded;
        return await fn(pageOf(own, seen, url));
      } finally {
        listeners.delete(listener);
        await send("Target.closeTarget", { targetId });
      }
    },
  };
}

async function prepare(own: Send, look: Look): Promise<void> {
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await own(`${domain}.enable`);
  await emulate(own, look);
  if (look.withoutScripts) await own("Emulation.setScriptExecutionDisabled", { value: true });
}

async function emulate(own: Send, look: Look): Promise<void> {
  await own("Emulation.setDeviceMetricsOverride", {
    width: look.width,
    height: look.height,
    deviceScaleFactor: look.phone ? 3 : 1,
    mobile: look.phone === true,
  });
  await own("Emulation.setEmulatedMedia", {
    media: look.print ? "print" : "",
    features: [{ name: "prefers-color-scheme", value: look.dark ? "dark" : "light" }],
  });
}

function pageOf(own: Send, seen: Message[], url: string): Loaded {
  const evaluate = async <T>(expression: string) => {
    const answer = await own("Runtime.evaluate", {
      ...{ expression, returnByValue: true, awaitPromise: true },
    });
    const { result, exceptionDetails } = answer as {
      result: { value: T };
      exceptionDetails?: object;
    };
    if (exceptionDetails) throw new Error(JSON.stringify(exceptionDetails));
    return result.value;
  };
  const of = (method: string) =>
    seen.flatMap((message) => (message.method === method ? [message.params ?? {}] : []));
  return {
    get problems() {
      return [
        ...of("Runtime.exceptionThrown").map((one) => JSON.stringify(one)),
        ...of("Runtime.consoleAPICalled").map((one) => JSON.stringify(one)),
        ...of("Log.entryAdded").map((one) => JSON.stringify(one)),
        ...of("Page.javascriptDialogOpening").map((one) => `dialog ${JSON.stringify(one)}`),
      ];
    },
    get requests() {
      return of("Network.requestWillBeSent")
        .map(({ request }) => String((request as { url: string }).url))
        .filter((one) => one !== url);
    },
    change: async (look) => {
      await emulate(own, look);
      const frame = "new Promise((done) => requestAnimationFrame(done))";
      for (let frames = 0; frames < 3; frames++) await evaluate(frame);
    },
    evaluate,
    press: async (key) => {
      const text = key === "Enter" ? "\r" : key === "/" ? key : undefined;
      const codes = { Enter: 13, Escape: 27, "/": 191 };
      const stroke = { key, windowsVirtualKeyCode: codes[key], ...(text && { text }) };
      await own("Input.dispatchKeyEvent", { type: "keyDown", ...stroke });
      await own("Input.dispatchKeyEvent", { type: "keyUp", ...stroke });
    },
    screenshot: async (whole = false) => {
      const answer = await own("Page.captureScreenshot", { captureBeyondViewport: whole });
      return Buffer.from(String(answer?.["data"]), "base64");
    },
  };
}
