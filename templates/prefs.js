// Preferences: every change is saved at once, alone, and says so. Contents: saving · quiet hours · events · this browser
const form = $("#prefs");
const quiet = form.elements.quiet;

// ── saving: what could not be saved is shown as it was
const kind = (control) => (control.type === "checkbox" ? "checked" : "value");
const saved = new Map([...form.elements].map((control) => [control, control[kind(control)]]));

async function save(changes, ...controls) {
	const sent = controls.map((control) => control[kind(control)]);
	const answer = await attempt("PATCH", "/api/preferences", changes);
	for (const [n, control] of controls.entries()) {
		if (answer) saved.set(control, sent[n]);
		else control[kind(control)] = saved.get(control);
	}
	$("#quiet-times").hidden = !quiet.checked;
	if (answer) toast(word("prefs.js.saved"));
	return answer;
}

function value(control) {
	if (control.type === "checkbox") return control.checked;
	return control.name === "digest_minutes" ? Number(control.value) : control.value;
}

async function onChange({ target }) {
	if (target.dataset.event) return saveEvent(target);
	if (target.name.startsWith("quiet")) return saveQuiet();
	const answer = await save({ [target.name]: value(target) }, target);
	if (answer && target.name === "locale") location.reload();
	if (answer && target.name === "push_enabled" && target.checked && !(await subscription())) connect();
}

// ── quiet hours: both times or none
function saveQuiet() {
	const { quiet_from: from, quiet_to: to } = form.elements;
	$("#quiet-times").hidden = !quiet.checked;
	if (quiet.checked && !(from.value && to.value)) return;
	save({ quiet_from: quiet.checked ? from.value : null, quiet_to: quiet.checked ? to.value : null }, quiet, from, to);
}

function listZones() {
	const select = $("#timezone");
	const here = Intl.DateTimeFormat().resolvedOptions().timeZone;
	const zones = new Set([select.value, here, "UTC", ...(Intl.supportedValuesOf?.("timeZone") ?? [])]);
	select.replaceChildren(...[...zones].map((zone) => new Option(zone, zone, false, zone === select.value)));
}

// ── events: the row's own entry, whole, so that it does not matter how entries merge
function saveEvent({ dataset: { event } }) {
	const row = [...form.querySelectorAll("[data-event]")].filter((control) => control.dataset.event === event);
	const entry = Object.fromEntries(row.map((control) => [control.dataset.channel, control.checked]));
	save({ events: { [event]: entry } }, ...row);
}

// ── this browser
const browser = $("#browser");
const [state, plug] = [$("small", browser), $("button", browser)];
const able = "PushManager" in window && "serviceWorker" in navigator && browser.dataset.key;

async function subscription() {
	if (!able) return null;
	const registration = await navigator.serviceWorker.getRegistration();
	return registration?.pushManager.getSubscription();
}

async function showBrowser(problem) {
	const on = Boolean(await subscription());
	state.textContent = word("prefs.js.browser_" + (problem ?? (on ? "on" : "off")));
	plug.textContent = word(on ? "prefs.js.disconnect" : "prefs.js.connect");
	plug.hidden = !able;
}

async function connect() {
	if (!able) return showBrowser("no");
	if ((await Notification.requestPermission()) !== "granted") return showBrowser("denied");
	await navigator.serviceWorker.register("/sw.js");
	const registration = await navigator.serviceWorker.ready;
	try {
		const made = await registration.pushManager.subscribe({
			userVisibleOnly: true,
			applicationServerKey: browser.dataset.key,
		});
		if (!(await attempt("POST", "/api/push/subscriptions", made.toJSON()))) await made.unsubscribe();
	} catch {
		return showBrowser("no");
	}
	showBrowser();
}

async function disconnect(made) {
	await attempt("DELETE", "/api/push/subscriptions", { endpoint: made.endpoint });
	await made.unsubscribe();
	showBrowser();
}

form.onsubmit = (event) => event.preventDefault();
form.onchange = onChange;
plug.onclick = async () => {
	const made = await subscription();
	if (made) disconnect(made);
	else connect();
};
listZones();
showBrowser(able ? undefined : "no");
