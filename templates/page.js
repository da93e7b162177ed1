// Bellhop's pages: the inbox, kept in step with the server without a reload.
// Contents: words · requests · times · messages · badge · list · outbox · actions · keys · live
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector) => document.querySelectorAll(selector);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const words = JSON.parse($("#words").textContent);
const { lang } = document.documentElement;
const { user } = document.body.dataset;

// ── words
const plural = new Intl.PluralRules(lang);

function word(key, values = {}) {
	const form = plural.select(values.n ?? 0) === "one" ? ".one" : ".other";
	return (words[key] ?? words[key + form]).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// ── requests
function signIn() {
	location.assign("/login?next=" + encodeURIComponent(location.pathname + location.search));
	return new Promise(() => {}); // the page is leaving, nothing goes on
}

async function api(method, path, body) {
	const reading = method === "GET";
	const response = await fetch(path, {
		method,
		cache: "no-cache", // an unchanged list costs a 304
		keepalive: !reading, // a clicked link marks its line read while the page goes away
		headers: reading ? {} : { "Content-Type": "application/json" },
		body: body && JSON.stringify(body),
	});
	if (response.status === 401) return signIn();
	const answer = await response.json().catch(() => ({}));
	if (!response.ok) throw new Error(answer.detail ?? response.status);
	return answer;
}

async function attempt(...request) {
	try {
		return await api(...request);
	} catch (error) {
		toast(word("js.failed", { why: error.message }));
	}
}

// ── times
const relative = new Intl.RelativeTimeFormat(lang, { numeric: "auto", style: "short" });
const exact = new Intl.DateTimeFormat(lang, { dateStyle: "full", timeStyle: "short" });
const units = { year: 31536e3, month: 2592e3, week: 604800, day: 86400, hour: 3600, minute: 60 };

function age(moment) {
	const seconds = (moment - Date.now()) / 1000;
	const unit = Object.keys(units).find((name) => Math.abs(seconds) >= units[name]);
	return relative.format(unit ? Math.trunc(seconds / units[unit]) : 0, unit ?? "second");
}

function clock(moment) {
	const today = moment.toDateString() === new Date().toDateString();
	return moment.toLocaleString(lang, { timeStyle: "short", dateStyle: today ? undefined : "medium" });
}

function put(element, text) {
	// Unchanged text stays untouched, so that a selection in it survives.
	if (element.textContent !== text) element.textContent = text;
}

function showTimes() {
	for (const time of $$("time")) {
		time.dateTime ||= time.textContent.replace(" ", "T"); // as the server drew it
		const moment = new Date(time.dateTime);
		time.title = exact.format(moment);
		put(time, time.className ? clock(moment) : age(moment));
	}
}

// ── messages
let toastTimer;

const button = (text, act) => make("button", { textContent: text, onclick: act });

function toast(text, ...buttons) {
	const box = $("#toast");
	box.replaceChildren(text, ...buttons);
	clearInterval(toastTimer);
	toastTimer = setInterval(() => box.matches(":hover, :focus-within") || box.replaceChildren(), 8000);
}

// ── badge
const { title } = document;
const icon = $("link[rel=icon]");
const iconUrl = icon.href;
let count;

async function badge(n) {
	if (n === count) return;
	count = n;
	document.title = n ? `(${n}) ${title}` : title;
	for (const mark of $$(".count")) mark.textContent = n || "";
	const svg = await (await fetch(iconUrl)).text();
	const dot = `<circle cx="22" cy="10" r="10" fill="#d92d20"/><text x="22" y="15" font="700 14px sans-serif"
		text-anchor="middle" fill="#fff">${n > 9 ? "9+" : n}</text></svg>`;
	if (n === count) icon.href = n ? "data:image/svg+xml," + encodeURIComponent(svg.replace("</svg>", dot)) : iconUrl;
}

// ── list
const list = $("#list");
const view = list?.dataset.view;
let wanted = 30; // how many the reader asked to see
let newest = list?.firstElementChild?.id ?? "";

const safe = (url) => (/^(https?:\/\/|\/(?!\/))[^\\\p{Cc}]*$/iu.test(url ?? "") ? url : "");

function dress(li) {
	// The buttons exist only here: without JavaScript they could do nothing.
	const small = $("small", li);
	if (!$("menu", li)) {
		li.insertAdjacentHTML("beforeend", "<menu><button class='i r'></button><button class='i a'></button></menu>");
		const time = small.firstChild;
		time.replaceWith(make("a", { href: "/n/" + li.id }));
		small.firstChild.append(time);
	}
	const names = [li.matches(".new") ? "js.read" : "js.unread", view === "archived" ? "js.restore" : "js.archive"];
	names.map((key) => word(key)).forEach((title, i) => {
		const ariaLabel = `${title}: ${$("h2", li).textContent}`;
		Object.assign($("menu", li).children[i], { title, ariaLabel });
	});
}

function fill(li, n) {
	const [sign, heading, body, small] = li.children;
	const url = safe(n.target_url);
	li.className = n.severity + (n.read_at ? "" : " new") + (li.matches(".fresh") ? " fresh" : "");
	put(sign, word("js.severity." + n.severity));
	put(heading.firstChild, n.title);
	heading.firstChild.href = url || "/n/" + n.id;
	put(body, n.body);
	$("time", small).dateTime = n.created_at;
	put(small.lastChild, n.event_name + (/^h/i.test(url) ? " · " + url.split("/")[2] : ""));
	dress(li);
}

function create(id) {
	const innerHTML = "<b></b><h2><a></a></h2><p></p><small><time></time><span></span></small>";
	return make("li", { id, innerHTML, className: id > newest ? "fresh" : "" });
}

function drop(li) {
	// Whoever works by keyboard goes on with the neighbour.
	if (li.contains(document.activeElement)) focusOn(li.nextElementSibling ?? li.previousElementSibling ?? $("h1"));
	li.remove();
}

function draw(items, more) {
	const ids = new Set(items.map((n) => n.id));
	for (const li of [...list.children]) if (!ids.has(li.id)) drop(li);
	let place = list.firstElementChild;
	for (const n of items) {
		const li = document.getElementById(n.id) ?? create(n.id);
		if (li === place) place = place.nextElementSibling;
		else list.insertBefore(li, place);
		fill(li, n);
	}
	const arrived = items.filter((n) => n.id > newest && !n.read_at).length;
	if (arrived && view !== "archived") $("#say").textContent = word("js.new", { n: arrived });
	if (items[0]?.id > newest) newest = items[0].id;
	$("#empty").hidden = items.length;
	$("#more").hidden = !more;
	showTimes();
}

async function fetchList() {
	const items = [];
	let page = {};
	do {
		const query = new URLSearchParams({ limit: Math.min(100, wanted - items.length) });
		if (view !== "all") query.set(view, 1);
		if (page.next_cursor) query.set("cursor", page.next_cursor);
		page = await api("GET", "/api/notifications?" + query);
		items.push(...page.notifications);
	} while (page.next_cursor && items.length < wanted);
	badge(page.unread_count);
	draw(items, page.next_cursor);
}

let running, again;

function sync() {
	// One at a time: hints that arrive meanwhile, however many, ask for one more round.
	again = true;
	running ??= (async () => {
		while (again) {
			again = false;
			if (list) await Promise.all([fetchList(), fetchOutbox()]);
			else badge((await api("GET", "/api/unread-count")).unread_count);
		}
	})().catch(() => { again = true; }).finally(() => { running = null; });
	return running;
}

// ── outbox
function leaving({ id, channel, items, available_at: at, status }) {
	const li = make("li");
	const name = word("js.channel." + channel);
	const parts = [items > 1 ? word("js.digest", { channel: name }) : name, word("js.items", { n: items })];
	const going = status === "sending";
	parts.push(word(going ? "js.leaving" : "js.leaves", { time: clock(new Date(at)) }));
	li.append(make("span", { textContent: parts.join(" · ") }));
	const post = (act) => attempt("POST", `/api/outbox/${id}/${act}`).then(sync);
	if (!going) li.append(...["send", "skip"].map((act) => button(word("js." + act), () => post(act))));
	return li;
}

let shownOutbox;

async function fetchOutbox() {
	const { outbox } = await api("GET", "/api/outbox");
	const now = JSON.stringify(outbox);
	if (now !== shownOutbox) $("#outbox").replaceChildren(...outbox.map(leaving));
	shownOutbox = now;
}

// ── actions
async function change(id, fields) {
	const answer = await attempt("PATCH", "/api/notifications/" + id, fields);
	if (answer) badge(answer.unread_count);
	sync();
	return answer;
}

function setRead(li, read) {
	if (li.matches(".new") !== read) return;
	li.classList.toggle("new", !read);
	dress(li);
	change(li.id, { read });
}

let undo = () => {};

async function archive(li) {
	const archived = view !== "archived";
	drop(li);
	if (!(await change(li.id, { archived }))) return;
	undo = () => {
		undo = () => {};
		toast("");
		change(li.id, { archived: !archived });
	};
	toast(word(archived ? "js.archived" : "js.restored"), button(word("js.undo"), () => undo()));
}

function onClick({ target }) {
	const li = target.closest("li");
	if (target.closest(".r")) setRead(li, li.matches(".new"));
	else if (target.closest(".a")) archive(li);
	else if (target.closest("h2 a")) setRead(li, true);
}

async function markAll() {
	// Up to the newest one on the screen: what arrives meanwhile stays unread.
	if (!list.firstElementChild) return;
	const answer = await attempt("PATCH", "/api/notifications", { all: true, before: list.firstElementChild.id });
	if (answer) toast(word("js.all_read", { n: answer.updated }));
	sync();
}

async function loadMore() {
	const shown = list.children.length;
	wanted += 30;
	await sync();
	focusOn(list.children[shown]);
}

// ── keys
let current;

function focusOn(element) {
	if (!element) return;
	element.tabIndex = -1;
	element.focus();
}

function onKey(event) {
	const { target, key } = event;
	const busy = target.closest("input, dialog") || event.ctrlKey || event.metaKey || event.altKey;
	if (busy || localStorage.keys === "off") return;
	current = target.closest("#list > li") ?? (current?.isConnected ? current : null);
	const li = current;
	const does = {
		j: () => focusOn(li ? li.nextElementSibling : list.firstElementChild),
		k: () => focusOn(li ? li.previousElementSibling : list.firstElementChild),
		e: () => li && archive(li),
		u: () => li && setRead(li, li.matches(".new")),
		z: () => undo(),
		"?": () => $("#help").showModal(),
		Enter: target === li && (() => $("h2 a", li).click()),
	}[key];
	if (!does) return;
	event.preventDefault();
	does();
	current = document.activeElement.closest("#list > li") ?? current;
}

// ── live: one tab holds the stream and tells the others, for a browser opens only six connections to a site
const tabs = new BroadcastChannel("bellhop:" + user);
let heard = 0; // the stream's last sign of life, here or in the tab that holds it
let stream, waiting, leading, wake;
const browser = () => import("./browser.js"); // alerts and signing out: fetched only when wanted

function hear({ on, news }) {
	heard = on ? Date.now() : 0;
	put($("#live"), word(on ? "js.live" : "js.lost"));
	$("#live").className = on ? "" : "lost";
	if (news === undefined) return;
	sync();
	navigator.serviceWorker?.controller?.postMessage("check"); // takes away what was read elsewhere
	if (localStorage.alerts === "on") browser().then(({ about }) => about(news, leading));
}

function tell(message) {
	tabs.postMessage(message);
	hear(message);
}

async function listen(signal) {
	const response = await fetch("/api/stream", { signal, cache: "no-store" });
	if (response.status === 401) return signIn();
	if (!response.ok) return;
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	for (let text = ""; ; ) {
		// The server speaks every 15 s; a longer silence means that something on the way cut us off.
		const silence = setTimeout(() => reader.cancel().catch(() => {}), 40000);
		const { done, value } = await reader.read();
		clearTimeout(silence);
		if (done) return;
		const events = (text + value).split(/\r?\n\r?\n/);
		text = events.pop();
		const data = events.map((event) => /^data:(.*)/m.exec(event)?.[1]).findLast(Boolean);
		tell({ on: true, news: data && JSON.parse(data).newest_id });
	}
}

async function hold() {
	const { signal } = (stream = new AbortController());
	leading = true;
	for (let pause = 500; ; ) {
		const began = Date.now();
		await listen(signal).catch(() => {});
		if (signal.aborted) return;
		pause = Date.now() - began > 5000 ? 500 : Math.min(pause * 2, 30000);
		tell({ on: false });
		await new Promise((done) => { wake = done; setTimeout(done, pause * (0.5 + Math.random())); });
	}
}

function lead(steal) {
	// The tab someone looks at takes the stream over: phones put the others to sleep.
	leading = steal;
	if (!navigator.locks) return stream ?? hold();
	waiting?.abort();
	const { signal } = (waiting = new AbortController());
	navigator.locks.request("bellhop:" + user, steal ? { steal } : { signal }, hold).catch(() => {
		if (signal.aborted) return;
		stream?.abort();
		lead(false);
	});
}

function look() {
	if (document.hidden) return;
	if (leading) sync();
	else lead(true); // a stream begins with a hint
	if (!heard) wake?.();
}

function rest() {
	leading = false;
	waiting?.abort();
	stream?.abort();
	stream = null;
}

function beat() {
	showTimes();
	const lost = Date.now() - heard > 40000;
	if (lost) hear({ on: false });
	if (lost || again || $("#outbox li")) sync(); // no stream: ask. A stream does not say when a message leaves.
}

// ── start
function startInbox() {
	for (const li of list.children) dress(li);
	list.onclick = onClick;
	list.onauxclick = (event) => event.button === 1 && onClick(event);
	document.addEventListener("keydown", onKey);
	if ($("#all")) $("#all").onclick = markAll;
	$("#more").onclick = loadMore;
	$("#keys").onclick = () => $("#help").showModal();
	const keys = $("#use-keys");
	keys.checked = localStorage.keys !== "off";
	keys.onchange = () => { localStorage.keys = keys.checked ? "on" : "off"; };
	const bell = $("#alerts");
	bell.hidden = !(window.Notification && navigator.serviceWorker);
	bell.ariaPressed = localStorage.alerts === "on";
	bell.onclick = async () => { bell.ariaPressed = await (await browser()).toggleAlerts(); };
}

for (const close of $$("[data-close]")) close.onclick = () => close.closest("dialog").close();
showTimes();
if (user) {
	if (list) startInbox();
	$("#logout").onclick = async () => (await browser()).signOut();
	tabs.onmessage = (event) => hear(event.data);
	if (document.hidden) lead(false);
	for (const moment of ["pageshow", "online", "visibilitychange"]) addEventListener(moment, look);
	addEventListener("pagehide", rest);
	setInterval(beat, 30000);
}
