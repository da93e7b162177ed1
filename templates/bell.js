// <bellhop-bell base-url="https://notify.example.com" token="…"></bellhop-bell>: a bell for any website.
//
// Attributes: base-url (default: where this file comes from), token, lang, theme ("light", "dark", "auto").
// Property:   getToken, an async function that returns a user token; asked again when one has expired.
// Events:     bellhop-count {count}; bellhop-open {notification}, preventDefault() keeps the browser from following.
// Style:      --bellhop-accent, -on-accent, -text, -soft, -background, -tint, -line, -font, -size, -width, -radius.
// The token travels in a header only, never in an address. Text is only ever set as text.
(() => {
	const home = new URL(document.currentScript?.src ?? location.href).origin;

	const languages = {
		en: ["Notifications", "{n} unread", "Mark all read", "Mark read", "Nothing here yet", "Open inbox", "No connection",
			"Info", "Success", "Warning", "Critical"],
		de: ["Benachrichtigungen", "{n} ungelesen", "Alle gelesen", "Als gelesen markieren", "Noch nichts da", "Zum Posteingang", "Keine Verbindung",
			"Info", "Erfolg", "Warnung", "Kritisch"],
		fr: ["Notifications", "{n} non lues", "Tout marquer comme lu", "Marquer comme lu", "Rien pour l’instant", "Ouvrir la boîte de réception", "Pas de connexion",
			"Info", "Succès", "Avertissement", "Critique"],
		hi: ["सूचनाएँ", "{n} अपठित", "सभी पढ़ी हुई", "पढ़ा हुआ चिह्नित करें", "अभी कुछ नहीं है", "इनबॉक्स खोलें", "कनेक्शन नहीं है",
			"जानकारी", "सफल", "चेतावनी", "गंभीर"],
		id: ["Notifikasi", "{n} belum dibaca", "Tandai semua dibaca", "Tandai dibaca", "Belum ada apa-apa", "Buka kotak masuk", "Tidak ada koneksi",
			"Info", "Berhasil", "Peringatan", "Kritis"],
		ko: ["알림", "읽지 않음 {n}개", "모두 읽음으로 표시", "읽음으로 표시", "아직 알림이 없습니다", "받은 알림함 열기", "연결 안 됨",
			"정보", "성공", "경고", "긴급"],
	};
	const [TITLE, UNREAD, ALL, READ, NONE, INBOX, LOST, SEVERITY] = [0, 1, 2, 3, 4, 5, 6, 7];
	const severities = ["info", "success", "warning", "critical"];

	const css = `
		:host { display: inline-block; }
		:host([hidden]) { display: none; }
		.root {
			all: initial; position: relative; display: inline-block; font: 14px/1.45 var(--bellhop-font, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", system-ui, sans-serif);
			--accent: var(--bellhop-accent, #7d1935); --on-accent: var(--bellhop-on-accent, #fff);
			--text: var(--bellhop-text, #231b1d); --soft: var(--bellhop-soft, #6b5e5b); --line: var(--bellhop-line, #e5dcd1);
			--background: var(--bellhop-background, #fffefc); --tint: var(--bellhop-tint, #f5f0ea);
			--info: #2b5d94; --success: #2b6b42; --warning: #8a5a00; --critical: #b3221d;
		}
		.root.dark {
			--accent: var(--bellhop-accent, #f2c572); --on-accent: var(--bellhop-on-accent, #2a1c05);
			--text: var(--bellhop-text, #f1eae5); --soft: var(--bellhop-soft, #ada19d); --line: var(--bellhop-line, #372e31);
			--background: var(--bellhop-background, #1e191b); --tint: var(--bellhop-tint, #2a2325);
			--info: #8dbcf2; --success: #84d19b; --warning: #f0b95a; --critical: #ff9088;
		}
		* { box-sizing: border-box; }
		button { margin: 0; border: 0; background: none; color: inherit; font: inherit; cursor: pointer; }
		:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
		.bell { position: relative; display: grid; place-items: center; width: var(--bellhop-size, 40px); height: var(--bellhop-size, 40px); padding: 0; border-radius: 50%; color: var(--text); }
		.off { position: absolute; width: 1px; height: 1px; overflow: hidden; }
		.bell:hover, .bell[aria-expanded=true] { background: var(--tint); }
		svg { width: 60%; height: 60%; fill: none; stroke: currentColor; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
		.badge { position: absolute; top: -2px; right: -4px; min-width: 20px; padding: 0 5px; border-radius: 10px; background: var(--accent); color: var(--on-accent); font-size: 12px; font-weight: 700; line-height: 20px; text-align: center; }
		.badge:empty, [hidden] { display: none; }
		.panel {
			position: absolute; z-index: 2147483000; top: calc(100% + 8px); right: 0; width: var(--bellhop-width, 360px); max-width: calc(100vw - 24px);
			border: 1px solid var(--line); border-radius: var(--bellhop-radius, 14px); background: var(--background); color: var(--text);
			box-shadow: 0 16px 48px -12px #0005; overflow: hidden; text-align: start; overflow-wrap: anywhere;
		}
		.panel.start { right: auto; left: 0; }
		.top, .foot { display: flex; align-items: center; justify-content: space-between; gap: 12px; padding: 12px 16px; }
		.top { border-bottom: 1px solid var(--line); font-weight: 700; font-size: 16px; }
		.top button, .foot a { padding: 4px 0; color: var(--accent); font-size: 14px; font-weight: 600; text-decoration: none; }
		.top button:hover, .foot a:hover { text-decoration: underline; }
		.foot { justify-content: center; border-top: 1px solid var(--line); }
		ol { max-height: min(420px, 60vh); margin: 0; padding: 0; overflow-y: auto; list-style: none; }
		li { position: relative; display: flex; align-items: flex-start; gap: 8px; padding-right: 8px; }
		li + li { border-top: 1px solid var(--line); }
		li:hover { background: var(--tint); }
		li.new::before { content: ""; position: absolute; left: 0; top: 12px; bottom: 12px; width: 3px; background: var(--c); border-radius: 0 3px 3px 0; }
		.info { --c: var(--info); } .success { --c: var(--success); } .warning { --c: var(--warning); } .critical { --c: var(--critical); }
		li a { flex: 1; min-width: 0; padding: 12px 0 12px 44px; color: var(--soft); text-decoration: none; }
		li a:focus-visible { outline-offset: -2px; }
		li a > :not(.off) { display: block; unicode-bidi: plaintext; }
		li a svg { position: absolute; left: 16px; top: 13px; width: 18px; height: 18px; color: var(--c); }
		strong { font-weight: 400; }
		.new strong { color: var(--text); font-weight: 650; }
		li a .text { display: -webkit-box; overflow: hidden; -webkit-box-orient: vertical; -webkit-line-clamp: 2; font-size: 13px; }
		time { font-size: 12px; }
		li button { flex: none; width: 32px; height: 32px; margin-top: 8px; padding: 6px; border-radius: 8px; color: var(--soft); }
		li button svg { width: 100%; height: 100%; }
		li button:hover { background: var(--background); color: var(--accent); }
		.none { margin: 0; padding: 32px 16px; color: var(--soft); text-align: center; }
		@media (max-width: 480px) { .panel, .panel.start { position: fixed; top: auto; left: 12px; right: 12px; width: auto; margin-top: 8px; } }
		@media (prefers-reduced-motion: no-preference) { .badge:not(:empty) { animation: pop .25s; } @keyframes pop { from { transform: scale(0); } } }
	`;

	const BELL = "M6 17V11a6 6 0 0 1 12 0v6l1.5 1.5h-15zM10 21.5h4";
	const CHECK = "m4 12.5 5 5L20 6.5";
	const CIRCLE = "M3 12a9 9 0 1 0 18 0 9 9 0 1 0-18 0";
	const SIGNS = {
		info: CIRCLE + "M12 11v5m0-8v.01",
		success: CIRCLE + "M8 12.5l3 3 5-6",
		warning: "M12 4 2.5 20h19zM12 10v4.5m0 2.5v.01",
		critical: "M8 3h8l5 5v8l-5 5H8l-5-5V8zM12 7.5v5.5m0 3.5v.01",
	};

	function make(tag, properties = {}, ...children) {
		const element = Object.assign(document.createElement(tag), properties);
		element.append(...children);
		return element;
	}

	function icon(path) {
		const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
		const line = document.createElementNS(svg.namespaceURI, "path");
		svg.setAttribute("viewBox", "0 0 24 24");
		svg.setAttribute("aria-hidden", "true");
		line.setAttribute("d", path);
		svg.append(line);
		return svg;
	}

	const safe = (url) => (/^(https?:\/\/|\/(?!\/))[^\\\p{Cc}]*$/iu.test(url ?? "") ? url : null);
	const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
	const units = { month: 2592e3, week: 604800, day: 86400, hour: 3600, minute: 60 };
	const systemDark = matchMedia("(prefers-color-scheme: dark)");

	class BellhopBell extends HTMLElement {
		static observedAttributes = ["base-url", "token", "lang", "theme"];
		#token = null;
		#getToken = null;
		#stream = null;
		#items = [];
		#count = 0;
		#reader = 0;
		#parts = {};

		constructor() {
			super();
			const early = Object.hasOwn(this, "getToken") && this.getToken; // set before this file arrived
			delete this.getToken;
			if (early) this.#getToken = early;
			this.#build();
		}

		get getToken() {
			return this.#getToken;
		}

		set getToken(callback) {
			this.#getToken = callback;
			this.#forget();
			this.#dress();
			this.#start();
		}

		connectedCallback() {
			document.addEventListener("visibilitychange", this.#start);
			document.addEventListener("pointerdown", this.#pressedOutside);
			document.addEventListener("keydown", this.#escape);
			systemDark.addEventListener("change", this.#dress);
			addEventListener("online", this.#start);
			this.#dress();
			this.#start();
		}

		disconnectedCallback() {
			document.removeEventListener("visibilitychange", this.#start);
			document.removeEventListener("pointerdown", this.#pressedOutside);
			document.removeEventListener("keydown", this.#escape);
			systemDark.removeEventListener("change", this.#dress);
			removeEventListener("online", this.#start);
			this.#stream?.abort();
		}

		attributeChangedCallback(name) {
			if (name === "token" || name === "base-url") this.#forget();
			this.#dress();
			if (name === "token" || name === "base-url") this.#start();
		}

		// Somebody else may sit here now: nothing of the last reader stays, and nothing on its way arrives.
		#forget() {
			this.#token = null;
			this.#items = [];
			this.#count = 0;
			this.#parts.says.textContent = "";
			this.#reader++;
		}

		// ── looks
		#build() {
			const root = this.attachShadow({ mode: "open" });
			const sheet = new CSSStyleSheet(); // allowed by a page's CSP where a <style> is not
			sheet.replaceSync(css);
			root.adoptedStyleSheets = [sheet];
			const badge = make("span", { className: "badge", ariaHidden: "true" });
			const bell = make("button", { className: "bell", type: "button", onclick: () => this.toggle() }, icon(BELL), badge);
			const title = make("span");
			const all = make("button", { type: "button", onclick: () => this.#markAll() });
			const list = make("ol", { onclick: (event) => this.#clicked(event) });
			const none = make("p", { className: "none" });
			const inbox = make("a");
			const panel = make("div", { className: "panel", role: "dialog", hidden: true },
				make("div", { className: "top" }, title, all), list, none, make("div", { className: "foot" }, inbox));
			const says = make("span", { className: "off", role: "status" });
			const box = make("div", { className: "root" }, bell, panel, says);
			bell.setAttribute("part", "bell");
			badge.setAttribute("part", "badge");
			panel.setAttribute("part", "panel");
			box.onfocusout = (event) => { if (event.relatedTarget && !box.contains(event.relatedTarget)) this.toggle(false); };
			root.append(box);
			this.#parts = { box, bell, badge, panel, title, all, list, none, inbox, says };
		}

		#word(index, n = 0) {
			const wanted = (this.lang || document.documentElement.lang || navigator.language).slice(0, 2);
			return (languages[wanted] ?? languages.en)[index].replace("{n}", n);
		}

		#dress = () => {
			const { box, bell, panel, title, all, none, inbox, badge } = this.#parts;
			const theme = this.getAttribute("theme");
			box.classList.toggle("dark", theme === "dark" || (theme === "auto" && systemDark.matches));
			title.textContent = panel.ariaLabel = this.#word(TITLE);
			all.textContent = this.#word(ALL);
			none.textContent = this.#word(NONE);
			inbox.textContent = this.#word(INBOX);
			inbox.href = this.#base + "/";
			badge.textContent = this.#count > 99 ? "99+" : this.#count || "";
			bell.ariaLabel = this.#word(TITLE) + (this.#count ? ", " + this.#word(UNREAD, this.#count) : "");
			bell.ariaExpanded = !panel.hidden;
			this.#draw();
		};

		#draw() {
			const { list, none, all } = this.#parts;
			const held = this.shadowRoot.activeElement?.closest("li");
			const [id, tag] = [held?.dataset.id, this.shadowRoot.activeElement?.localName];
			list.replaceChildren(...this.#items.map((item) => this.#line(item)));
			if (id) (list.querySelector(`[data-id="${id}"] ${tag}`) ?? list.querySelector(`[data-id="${id}"] a`) ?? this.#parts.bell).focus();
			none.hidden = this.#items.length > 0;
			if (!this.#count && this.shadowRoot.activeElement === all) this.#parts.bell.focus(); // it goes, the focus stays
			all.hidden = !this.#count;
		}

		#line(n) {
			const lang = this.lang || document.documentElement.lang || undefined;
			const seconds = (new Date(n.created_at) - Date.now()) / 1000;
			const unit = Object.keys(units).find((name) => Math.abs(seconds) >= units[name]);
			const age = new Intl.RelativeTimeFormat(lang, { numeric: "auto", style: "short" });
			const time = make("time", {
				dateTime: n.created_at,
				title: new Date(n.created_at).toLocaleString(lang),
				textContent: age.format(unit ? Math.trunc(seconds / units[unit]) : 0, unit ?? "second"),
			});
			const link = make("a", { href: safe(n.target_url) ?? `${this.#base}/n/${n.id}` },
				icon(SIGNS[n.severity]), make("span", { className: "off", textContent: this.#word(SEVERITY + severities.indexOf(n.severity)) }),
				make("strong", { textContent: n.title }), make("span", { className: "text", textContent: n.body }), time);
			const line = make("li", { className: n.severity + (n.read_at ? "" : " new") }, link);
			line.dataset.id = n.id;
			if (!n.read_at) {
				const label = this.#word(READ);
				line.append(make("button", { type: "button", title: label, ariaLabel: `${label}: ${n.title}` }, icon(CHECK)));
			}
			return line;
		}

		toggle(open = this.#parts.panel.hidden) {
			const { panel, bell } = this.#parts;
			const middle = bell.getBoundingClientRect().left + bell.offsetWidth / 2;
			panel.classList.toggle("start", middle < innerWidth / 2);
			panel.hidden = !open;
			this.#dress();
		}

		#pressedOutside = (event) => {
			if (!this.#parts.panel.hidden && !event.composedPath().includes(this)) this.toggle(false);
		};

		#escape = (event) => {
			if (event.key !== "Escape" || this.#parts.panel.hidden) return;
			this.toggle(false);
			this.#parts.bell.focus();
		};

		// ── what the reader does
		#clicked(event) {
			const line = event.target.closest("li");
			const n = this.#items.find((item) => item.id === line?.dataset.id);
			if (!n) return;
			if (event.target.closest("button")) this.#markRead(n);
			else if (event.target.closest("a")) {
				if (!n.read_at) this.#markRead(n);
				const follow = this.#tell("open", { notification: n });
				if (!follow) event.preventDefault();
			}
		}

		#markRead(n) {
			return this.#change(`/api/notifications/${n.id}`, { read: true });
		}

		#markAll() {
			// Up to the newest one shown: what arrives meanwhile stays unread.
			return this.#change("/api/notifications", { all: true, before: this.#items[0]?.id });
		}

		async #change(path, body) {
			const reader = this.#reader;
			try {
				await this.#ask(path, { method: "PATCH", body: JSON.stringify(body), keepalive: true });
				await this.refresh();
			} catch {
				if (reader === this.#reader) this.#parts.says.textContent = this.#word(LOST);
			}
		}

		#tell(name, detail) {
			return this.dispatchEvent(new CustomEvent("bellhop-" + name, { detail, bubbles: true, composed: true, cancelable: true }));
		}

		// ── talking to the server
		get #base() {
			return new URL(this.getAttribute("base-url") || home, location.href).href.replace(/\/+$/, "");
		}

		async #ask(path, options = {}) {
			const reader = this.#reader;
			for (const last of [false, true]) {
				const token = this.#token ?? (this.#getToken ? await this.#getToken() : this.getAttribute("token"));
				if (reader !== this.#reader) throw new Error("another reader"); // whose token this is not
				this.#token = token;
				const headers = { Authorization: `Bearer ${this.#token}` };
				if (options.body) headers["Content-Type"] = "application/json";
				const response = await fetch(this.#base + path, { ...options, headers, credentials: "omit", cache: "no-store" });
				if (response.ok) return response;
				if (reader !== this.#reader) throw new Error("another reader");
				if (response.status === 401) this.#token = null; // expired: the callback knows a new one
				if (last || response.status !== 401 || !this.#getToken) throw new Error(`HTTP ${response.status}`);
			}
		}

		async refresh() {
			const reader = this.#reader;
			const response = await this.#ask("/api/notifications?limit=10");
			const { notifications, unread_count: count } = await response.json();
			if (reader !== this.#reader) return;
			const changed = count !== this.#count;
			this.#items = notifications;
			this.#count = count;
			this.#parts.says.textContent = changed && count ? this.#word(UNREAD, count) : "";
			this.#dress();
			if (changed) this.#tell("count", { count });
		}

		#start = () => {
			// Out of sight the bell holds no connection; back in view it begins with a hint and so catches up.
			this.#stream?.abort();
			const possible = this.#getToken || this.getAttribute("token");
			if (document.hidden || !this.isConnected || !possible) return;
			this.#stream = new AbortController();
			this.#follow(this.#stream.signal);
		};

		async #follow(signal) {
			for (let pause = 1000; !signal.aborted; ) {
				const began = Date.now();
				await this.#listen(signal).catch(() => {});
				pause = Date.now() - began > 5000 ? 1000 : Math.min(pause * 2, 30000);
				await wait(pause * (0.5 + Math.random() / 2));
				if (!signal.aborted) await this.refresh().catch(() => {}); // no stream: ask
			}
		}

		async #listen(signal) {
			const response = await this.#ask("/api/stream", { signal });
			const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
			for (let text = ""; ; ) {
				// The server speaks every 15 s; a longer silence means that something on the way cut us off.
				const silence = setTimeout(() => reader.cancel().catch(() => {}), 40000);
				const { done, value } = await reader.read();
				clearTimeout(silence);
				if (done) return;
				const events = (text + value).split(/\r?\n\r?\n/);
				text = events.pop();
				if (events.some((event) => /^data:/m.test(event))) await this.refresh().catch(() => {});
			}
		}
	}

	if (!customElements.get("bellhop-bell")) customElements.define("bellhop-bell", BellhopBell);
})();
